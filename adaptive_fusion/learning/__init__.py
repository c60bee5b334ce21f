"""From labelled logs to a policy: metrics, data sets, fitting, calibration, evaluation.

Never imported by the runtime: everything in here may lean on the heavy packages of the `train` extra.
"""
