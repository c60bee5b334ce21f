"""``adaptive-fusion bench``: what each operating point answers (`quality`), what it takes (`cost`), how well
budgets are kept (`budget`), what policies keep of real images (`real`), and what a gateway saves before an engine
(`gateway`).

One module a command: it parses options, shows progress and prints. The work is in `adaptive_fusion.bench`, imported
when a command runs.
"""

import typer

from adaptive_fusion.commands.bench.budget import budget
from adaptive_fusion.commands.bench.cost import cost
from adaptive_fusion.commands.bench.gateway import gateway
from adaptive_fusion.commands.bench.quality import quality
from adaptive_fusion.commands.bench.real import real

app = typer.Typer(
    name="bench", help="Measure what the operating points are worth and what they take.", no_args_is_help=True
)
for _command in (quality, cost, budget, real, gateway):
    app.command()(_command)
