"""From labelled logs to a policy: data sets, labelling, fitting, judging, distillation.

Never imported by the runtime: everything in here may lean on the heavy packages of the `train` extra.
"""
