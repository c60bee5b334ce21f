"""The control law and its gains. To make the controller react otherwise, change a number here and in its sentence.

A test holds the two together. There is no code here: `estimators` has the arithmetic of what is learned, `learned`
feeds it with measurements, `weighing` compares the candidates with it, `controller` calls all of that.

The law, per measured quantity (time to the first token, total latency), with y(o, x) the predicted
milliseconds of operating point o on request x:

- drift: residual ``r = ln(measured / y) - m - d_o``, where m is the common drift and d_o the point's own; ``e`` is r
  clipped to +-0.7; ``m += 0.08 e``; ``d_o = 0.995 d_o + 0.03 e``. A request for which no encoder ran, as its output was
  cached, teaches d_o and w_o of a point of its own and nothing that is common;
- spread: ``w += 0.03 (|e| - w)``, from 0.3, for all points together and likewise for each (its first residuals
  averaged). The spread w_o of a point is the mean of both, its own weighted by how many residuals it has had, up to
  33, that of all points by 10; it is at least 0.005;
- risk: P(late) of a point is that of Student's t with 2 degrees of freedom, whose tails are as heavy as those of
  latencies and whose distribution function has a closed form, of mean m + d_o and mean absolute deviation w_o, to
  exceed ``ln((limit - elapsed) / y)``, where elapsed counts queueing; of several limits the largest;
- step detection, two one-sided CUSUMs (Page 1954): ``S = max(0, S + e - 0.12)``; above 0.6 the median of
  the last 4 residuals is added to m and both start again; downward likewise, above 1.0;
- choice: the highest worth ``quality - price x P(late)``, the Lagrangian of "the best quality at a share of misses of
  at most 1 - attainment" (Everett 1963): misses are allowed where they buy most, but no risk above 0.8 is taken, so
  that what is late is not late by much. Of equal worth the one of higher quality is taken, of equal quality the
  cheaper. If nothing is worth more than 0: the one predicted to take least time of those that fit in memory, whatever
  was learned of it, else the one that needs least memory, marked infeasible, or `InfeasibleBudgetError` when the
  budget asks for refusal. Where the answer is cut off at the deadline, refusal needs more: that nothing fits in
  memory, or a first token that is predicted, without regard to risk, after the deadline;
- price, one for each attainment level in use, by dual ascent (a virtual queue, Neely 2010):
  ``price += 0.3 (miss - (1 - attainment))``, from 2, at least 0.5 (half an answer) and at most 50. Of requests not
  thought to fit only kept ones count. So, whatever the load does and however wrong P(late) is, misses of requests
  thought to fit are at most ``(1 - attainment) n + (price_n - 2) / 0.3``, as long as the price stays below its upper
  end;
- a refusal measures nothing, so it lowers m by 0.02: else a controller that refuses everything would never
  find out that the load is over;
- a request cut off after c ms enters as ``r = ln(c / y) - m - d_o`` and, if it was thought to fit, as a miss. If
  r <= 0 the cut came before the expected end and says nothing of the drift. A request that was given up by whoever
  asked is a miss only if it was late by then;
- - memory: a point fits if ``predicted * v <= min(free, vram_gb)``, with v the upper envelope of measured / predicted
  (its logarithm clipped as r is): its maximum x 1.05, forgotten by 0.02 % a request; it is never below that factor;
  an out-of-memory error raises v by the same x 1.05; with blank parts spared the peak without is predicted, and only
  one above it counts;
- ceilings, only after out of memory (on predicted memory) and overload (on predicted time): points
  predicted to need as much as the one that failed are out at once; after 25 clean requests the ceiling
  rises by one step (x 1.25), until it is gone; a failure within the trial doubles the wait, up to 1,600;
- two passes: where the model is not sure of a cheap plan's answer the better plan runs after its prefill. With c1 and
  c2 the times of both and p the share that goes on, the mean cost is c1 + p c2 (a first pass that is given up costs
  its prefill only), the risk (1 - p) P(c1 late) + p P(c1 + c2 late), c1 taken off what is left at its expected time.
  p is a running mean of the last 200 verdicts of the plan's rung and kind of question, together with 10 at the share
  expected beforehand. The worth is that of going on at random; with a learned threshold it is at least the better
  plan's quality less what its rows still lost. No verdict is taken unless the better plan is by then in time with the
  probability that the budget asks for. Each pass teaches its own rung, with its own time;
- bounds: m stays within +-8, the margin that is told is at most e^3 times what is expected; own drifts are kept for
  256 points and prices for 16 attainment levels, the oldest makes room; a request that finishes
  more than 600 s after its choice teaches nothing; one that was cut off is a miss however old it is.
"""

# Drift, in ln(measured / predicted)
RESIDUAL_CLIP = 0.7
COMMON_GAIN = 0.08
OWN_KEEP, OWN_GAIN = 0.995, 0.03

# Spread, in mean absolute residuals
SPREAD_GAIN, SPREAD_START, SPREAD_MIN = 0.03, 0.3, 0.005
OWN_WEIGHT_MAX, COMMON_WEIGHT = 33, 10

# Step detection
STEP_SLACK, STEP_UP, STEP_DOWN = 0.12, 0.6, 1.0
STEP_RESIDUALS = 4

# Choice
RISK_MAX = 0.8

# Price of a miss, in answers of quality 1
PRICE_GAIN, PRICE_START = 0.3, 2.0
PRICE_MIN, PRICE_MAX = 0.5, 50.0

# Refusal
REFUSAL_FADE = 0.02

# Memory: a factor, and a share of it a request
MEMORY_HEADROOM, MEMORY_FORGET = 1.05, 0.0002

# Ceilings: a factor, and clean requests
CEILING_STEP = 1.25
CEILING_WAIT, CEILING_WAIT_MAX = 25, 1600

# Two passes, in verdicts
SHARE_WEIGHT, SHARE_MEMORY = 10, 200

# Bounds
DRIFT_MAX = 8.0
MARGIN_MAX = 3.0
MAX_POINTS, MAX_LEVELS = 256, 16
STALE_S = 600.0
