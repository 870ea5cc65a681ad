"""Reads documents from tables: a dataset of the Hugging Face hub, or parquet files. The column is `text`."""
import logging
from collections.abc import Iterator
from pathlib import Path

from common import Failure, one_line, row_text
from files import text_files

COLUMN = "text"


def stream_rows(name: str, config: str | None, split: str, args) -> Iterator[str]:
    """Streams the texts of a dataset of the hub. A null becomes an empty text."""
    try:
        import datasets
    except ImportError as error:
        raise Failure(f"the dataset {name} needs the package datasets: pip install datasets") from error
    datasets.disable_progress_bars()
    for library in "datasets", "huggingface_hub":
        logging.getLogger(library).setLevel(logging.CRITICAL)  # the error has the same text
    try:
        for number, row in enumerate(datasets.load_dataset(name, config, split=split, streaming=True), 1):
            yield row_text(row, COLUMN, f"{name}, row {number}", args.errors)
    except Failure:
        raise
    except Exception as error:  # the library raises many types, some of them from five other libraries
        raise cannot_read(name, error) from error


def parquet_rows(args) -> Iterator[str]:
    """Reads the texts of a parquet file, or of all those in a folder. A null becomes an empty text."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise Failure("--from reads parquet files with the package pyarrow: pip install pyarrow") from error
    files = text_files([args.local], args)
    if Path(args.local).is_dir():
        for file in files:
            if file.suffix != ".parquet":
                args.skipped.add("files that are not .parquet", file)
        files = [file for file in files if file.suffix == ".parquet"]
        if not files:
            raise Failure(f"{args.local}: no .parquet files in this folder")
    for path in files:
        number = 0
        try:
            with open(path, "rb") as file:  # because the library cannot open names that are not UTF-8
                table = ParquetFile(file)
                if COLUMN not in table.schema_arrow.names:
                    raise Failure(f"{path}: expected a column {COLUMN!r}, "
                                  f"found {', '.join(map(repr, table.schema_arrow.names)) or 'none'}")
                for batch in table.iter_batches(batch_size=256, columns=[COLUMN]):
                    for row in batch.to_pylist():
                        number += 1
                        yield row_text(row, COLUMN, f"{path}, row {number}", args.errors)
        except Failure:
            raise
        except Exception as error:
            raise cannot_read(path, error) from error
        if number == 0:
            args.skipped.add("files without rows", path)


def cannot_read(what, error: Exception) -> Failure:
    return Failure(f"cannot read {what}: {type(error).__name__}: {one_line(error)[:300]}")
