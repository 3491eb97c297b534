"""Examples of columnar files: Parquet, and datasets in Arrow.

A struct column has the keys of all its records in every record; a key that a record did not have is null. Such keys are
dropped, so that an example is as it was before it was stored. A null that was meant looks the same and is dropped too;
JSON lines keep it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_hub.data.readers.examples import RawExample
from lightning_hub.data.readers.limits import ExampleLimits

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_BATCH_SIZE = 1024
_DICTIONARY_BUDGET = 256_000_000
_MAX_RATIO = 200
"""The most by which a large column may exceed its size in the file; more is an attack, not compression."""


def without_struct_nulls(value: object) -> object:
    """A value of a column without the keys that its structs have from other records.

    Nulls that are items of a list or values of a map stay.
    """
    if isinstance(value, dict):
        return {key: without_struct_nulls(child) for key, child in value.items() if child is not None}
    if isinstance(value, list) and value and isinstance(value[0], tuple):  # a map
        return {key: without_struct_nulls(child) for key, child in value}
    if isinstance(value, list) and value and isinstance(value[0], dict | list | type(None)):
        return [without_struct_nulls(child) for child in value]
    return value


def restore_example(data: dict[str, object], kept: frozenset[str] = frozenset()) -> dict[str, object]:
    """A record of a columnar file as it was before it was stored.

    Args:
        data: The record as read.
        kept: Columns in which nulls are values.
    """
    return {
        key: without_struct_nulls(value) if isinstance(value, dict | list) and key not in kept else value
        for key, value in data.items()
    }


def read_parquet(path: Path, limits: ExampleLimits) -> Iterator[RawExample]:
    """The records of a Parquet file; the place of a record is its number, counted from 1."""
    import pyarrow as pa  # 0.2 s and 60 MB, for Parquet only
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.metadata.num_row_groups):
                if problem := _unpacks_to_too_much(file, group, limits):
                    yield RawExample(f"{path}:{number + 1}", {}, problem)
                    return
                for batch in file.iter_batches(batch_size=_batch_size(file, group), row_groups=[group]):
                    for data, problem in _batch_examples(batch, limits):
                        number += 1
                        yield RawExample(f"{path}:{number}", data, problem)
    except (pa.ArrowException, OSError, ValueError, MemoryError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield RawExample(f"{path}:{number + 1}", {}, f"not Parquet: {reason}")


def _unpacks_to_too_much(file: pq.ParquetFile, group: int, limits: ExampleLimits) -> str:
    """Name a column of a row group that is small in the file and huge in memory; "" if there is none."""
    about = file.metadata.row_group(group)
    for index in range(about.num_columns):
        column = about.column(index)
        whole, stored = column.total_uncompressed_size, max(1, column.total_compressed_size)
        if whole > limits.max_bytes and whole > _MAX_RATIO * stored:
            return f"the column {column.path_in_schema!r} unpacks to {whole / 1e6:,.0f} MB from {stored / 1e6:.1f} MB"
    return ""


def _batch_size(file: pq.ParquetFile, group: int) -> int:
    """Records to read at a time: fewer if each of them could refer to one large entry of a column's dictionary."""
    about = file.metadata.row_group(group)
    columns = [about.column(index) for index in range(about.num_columns)]
    largest = max((column.total_uncompressed_size for column in columns if column.has_dictionary_page), default=0)
    return max(1, min(_BATCH_SIZE, _DICTIONARY_BUDGET // max(1, largest)))


def _batch_examples(batch: object, limits: ExampleLimits) -> Iterator[tuple[dict[str, object], str]]:
    """The records of a batch, each with "" or why it cannot be used."""
    if batch.nbytes <= limits.max_bytes:  # type: ignore[attr-defined]
        for data in batch.to_pylist():  # type: ignore[attr-defined]
            yield restore_example(data), ""
        return
    for index in range(batch.num_rows):  # type: ignore[attr-defined]
        record = batch.slice(index, 1)  # type: ignore[attr-defined]
        if record.nbytes > limits.max_bytes:
            yield {}, f"the example is {limits.too_large}"
        else:
            yield restore_example(record.to_pylist()[0]), ""
