"""The `slm-data` command: tokenizer, shards, verify, stats, show, import, export.

Owns the arguments and what is printed; each command is one call into the module that does the work.

    slm-data tokenizer corpus.jsonl --output tokenizer --vocab-size 8192
    slm-data shards corpus.jsonl --tokenizer tokenizer --output data/mine
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from slm.errors import CorruptArtefact, SLMError, UserError
from slm.redact import redact_record, redacted

app = typer.Typer(
    help="From text to token shards. INPUT is JSON lines (.jsonl, .json; also .gz, .zst, .bz2), Parquet, Arrow, text files "
    "(long ones are cut into several documents), folders (structured files as such, any other text file a document) or "
    "hf://NAME?split=train (a dataset of Hugging Face, streamed).",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Inputs = Annotated[list[str], typer.Argument(metavar="INPUT...", help="files, folders, hf://NAME")]
TextKey = Annotated[str, typer.Option(help="the field or column that holds the text")]
MaxBad = Annotated[
    float, typer.Option(help="give up if a larger share of the documents (of a folder's bytes) is unusable")
]


class Kind(Enum):
    bpe = "bpe"
    sentencepiece = "sentencepiece"


class OnBad(Enum):
    skip = "skip"
    replace = "replace"
    fail = "fail"


class Encoder(Enum):
    auto = "auto"
    reference = "reference"
    gigatoken = "gigatoken"


class Width(Enum):
    uint16 = "uint16"
    uint32 = "uint32"


class Layout(Enum):
    megatron = "megatron"
    datatrove = "datatrove"
    olmo = "olmo"


def main() -> None:
    """Entry point: errors that a user can mend are one message and an exit code, never a traceback."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(redact_record)
    try:
        app()
    except SLMError as error:
        if not getattr(error, "told", False):  # under mpirun, what the first rank found is said by it alone
            typer.echo(redacted(f"{error.title}: {error}"), err=True)
        sys.exit(error.exit_code)
    except Exception:  # a bug; what is printed may be kept as a log
        typer.echo(redacted(traceback.format_exc()), err=True, nl=False)
        sys.exit(1)


@app.command()
def tokenizer(
    inputs: Inputs,
    output: Annotated[Path, typer.Option(help="folder for the tokenizer")],
    vocab_size: Annotated[int, typer.Option(help="tokens at most, special ones included")],
    kind: Annotated[Kind, typer.Option(help="byte-level BPE, or SentencePiece BPE")] = Kind.bpe,
    max_bytes: Annotated[str, typer.Option(help="read evenly spread parts up to this much text")] = "200M",
    text_key: TextKey = "text",
    max_bad_fraction: MaxBad = 0.01,
) -> None:
    """Learn a tokenizer from text."""
    from data_prep.corpus import human_bytes
    from data_prep.tokenizer import make_tokenizer

    limit = _count("--max-bytes", max_bytes)
    made, num_bytes = make_tokenizer(
        inputs,
        output,
        vocab_size=vocab_size,
        kind=kind.value,
        max_bytes=limit,
        text_key=text_key,
        max_bad_fraction=max_bad_fraction,
    )
    state = f"learned from {human_bytes(num_bytes)}" if num_bytes else "complete already, nothing to do"
    typer.echo(f"{output}: {len(made):,} tokens ({made.kind}), {state}; fingerprint {made.fingerprint[:16]}")


@app.command()
def shards(
    inputs: Inputs,
    tokenizer: Annotated[str, typer.Option(help="a tokenizer's folder or file, or module:Class")],
    output: Annotated[Path, typer.Option(help="folder for train/ and validation/")],
    validation_fraction: Annotated[float, typer.Option(help="share of the documents held out, by their hash")] = 0.02,
    processes: Annotated[
        int | None, typer.Option(help="default: one a core; one alone uses two; any number gives the same bytes")
    ] = None,
    text_key: TextKey = "text",
    max_bad_fraction: MaxBad = 0.01,
    on_bad: Annotated[
        OnBad, typer.Option(help="what is no document: skip it (and count), replace what is no UTF-8, or fail")
    ] = OnBad.skip,
    max_doc_bytes: Annotated[str, typer.Option(help="longer documents are rejected: bounds the memory")] = "64Mi",
    min_tokens: Annotated[int, typer.Option(min=0, help="shorter documents are left out (BOS and EOS count)")] = 0,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="longer documents are left out")] = None,
    deduplicate: Annotated[bool, typer.Option(help="of equal documents keep the first, in a pass before")] = False,
    engine: Annotated[
        Encoder, typer.Option(help="auto: gigatoken if it is installed and agrees, else the reference")
    ] = Encoder.auto,
    shard_bytes: Annotated[str, typer.Option(help="text per shard, such as 64M; a kill costs one at most")] = "auto",
) -> None:
    """Encode text into token shards. Killed, it goes on by the same command; under mpirun, srun or a SLURM array, or started
    several times, the processes share the work."""
    from data_prep.claims import find_share
    from data_prep.reading import Reading
    from data_prep.shards import make_shards, summarise

    try:
        result = make_shards(
            inputs,
            tokenizer,
            output,
            validation_fraction=validation_fraction,
            processes=processes,
            reading=Reading(text_key, on_bad.value, _count("--max-doc-bytes", max_doc_bytes)),
            max_bad_fraction=max_bad_fraction,
            shard_bytes=None if shard_bytes == "auto" else _count("--shard-bytes", shard_bytes),
            min_tokens=min_tokens,
            max_tokens=max_tokens,
            deduplicate=deduplicate,
            engine=engine.value,
        )
    except KeyboardInterrupt:
        typer.echo("stopped; what is finished is kept, and the same command goes on", err=True)
        sys.exit(130)
    if not find_share().leads:
        return
    if result.already:
        typer.echo(f"{output}: complete already, nothing to do")
    typer.echo(summarise(result))


@app.command()
def verify(folder: Annotated[Path, typer.Argument(metavar="DIR", help="a dataset, or a folder of several")]) -> None:
    """Read datasets in full and say whether they are whole; exit code 4 if not."""
    from data_prep.verify import verify as check

    num_broken = 0
    for line, whole in check(folder):
        typer.echo(line)
        num_broken += not whole
    if num_broken:
        raise CorruptArtefact(
            f"{num_broken} of the datasets in {folder} cannot be trusted",
            fix="copy it again, or make it again with slm-data shards in a new folder",
        )


@app.command()
def stats(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a dataset, or a folder of several")],
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Count and draw: documents, tokens by source, lengths, bytes per token."""
    from data_prep.stats import draw
    from data_prep.stats import stats as count
    from data_prep.verify import find_datasets

    found = [count(path) for path in find_datasets(folder)]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for one in found:
        draw(one)


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a dataset")],
    doc: Annotated[int, typer.Option(help="which document, from 0")],
    tokenizer: Annotated[str, typer.Option(help="if it is no longer where the dataset says")] = "",
) -> None:
    """Decode a document and say which line of which file it came from."""
    from data_prep.show import show as describe

    typer.echo(describe(folder, doc, tokenizer))


@app.command("import")
def import_(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="files, prefixes or folders")],
    layout: Annotated[Layout, typer.Option("--format", help="whose files these are")],
    tokenizer: Annotated[str, typer.Option(help="what the tokens were made with")],
    output: Annotated[Path, typer.Option(help="folder of the new dataset")],
    dtype: Annotated[Width | None, typer.Option(help="of the ids; default: what the files show")] = None,
) -> None:
    """Make a dataset of tokens that Megatron, datatrove or OLMo wrote; the tokens are copied as they are."""
    from data_prep.exchange import import_dataset

    manifest = import_dataset(inputs, layout.value, tokenizer, output, dtype.value if dtype else None)
    typer.echo(f"{output}: {manifest['num_docs']:,} documents, {manifest['num_tokens']:,} tokens")


@app.command("export")
def export_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a dataset")],
    layout: Annotated[Layout, typer.Option("--format", help="whose files to write")],
    output: Annotated[Path, typer.Option(help="folder to write")],
) -> None:
    """Write a dataset as Megatron, datatrove or OLMo files; the tokens are copied as they are."""
    from data_prep.exchange import export_dataset

    for path in export_dataset(folder, layout.value, output):
        typer.echo(str(path))


def _count(option: str, text: str) -> int:
    from slm.fields import parse_count

    try:
        return parse_count(text)
    except ValueError as error:
        raise UserError(f"{option}: {error}", fix="write it as 200M or 64Mi") from None


if __name__ == "__main__":
    main()
