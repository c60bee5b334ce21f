"""From labelled data to a policy: search, calibration, thresholds, ladders, the gate."""
