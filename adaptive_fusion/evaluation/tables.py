"""Tables that people write: CSV files with a header, as rows of text.

Must not know what the columns mean.
"""

import csv
import io
from pathlib import Path
from typing import Any

from adaptive_fusion.errors import ConfigError


def read_table(file: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows of a CSV file in UTF-8, with or without a byte order mark; None where a row is too short.

    What a row has beyond the columns is listed under None.

    Raises:
        ConfigError: For a file that cannot be read, or with two columns of one name.
    """
    try:
        # Half a character in one row is for whoever reads that row to refuse, not the whole table.
        text = file.read_text(encoding="utf-8-sig", errors="surrogatepass")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        columns, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"table {file.name!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise ConfigError(f"table {file.name!r} has the columns {twice} more than once; expected each once")
    return columns, rows
