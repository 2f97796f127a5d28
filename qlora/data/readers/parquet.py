"""Parquet files."""

from __future__ import annotations

from ...system.errors import InputError
from . import lines


def rows(file):
    """Yield the rows; their number, from 1, is their line."""
    import pyarrow
    import pyarrow.parquet

    lines.open_file(file.path).close()
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path, page_checksum_verification=True) as parquet:
            names = parquet.schema_arrow.names
            if len(set(names)) != len(names):
                raise InputError(f"{file.path}: duplicate column name")
            total = max(1, parquet.metadata.num_rows)
            for batch in parquet.iter_batches(batch_size=64):  # of 64 rows, which may be long
                for value in batch.to_pylist():
                    number += 1
                    yield lines.Row(number, value)
                file.done = file.size * number // total
    # OSError: pages that cannot be unpacked; ValueError and OverflowError: bytes that are no text, dates that are none
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"{file.path} is not a complete Parquet file: after row {number}: {lines.first_line(error)}"
        ) from None


def header(file):
    """Return the columns that every row has; None for what `rows` has to explain."""
    import pyarrow
    import pyarrow.parquet

    lines.open_file(file.path).close()
    try:
        return pyarrow.parquet.read_schema(file.path).names
    except (pyarrow.ArrowException, OSError, ValueError):
        return None
