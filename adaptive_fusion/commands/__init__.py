"""The commands of ``adaptive-fusion``, one file each with a typer app named ``app``, listed in `cli`.

`options` holds the options they share, `output` how results and errors are printed, `pictures` what is drawn for
them. Modules here import only typer, rich and plain modules at the top, so that ``--help`` is quick.
"""
