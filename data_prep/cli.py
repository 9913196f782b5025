"""The `slm-data` command: tokenizer, shards, verify.

Owns the arguments and what is printed; each command is one call into the module that does the work.

    slm-data tokenizer corpus.jsonl --output tokenizer --vocab-size 8192
    slm-data shards corpus.jsonl --tokenizer tokenizer --output data/mine
"""

from __future__ import annotations

import logging
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from slm.errors import CorruptArtefact, SLMError, UserError

app = typer.Typer(
    help="From text to token shards: INPUT is JSON lines (.jsonl, .json), text files (long ones are cut into several "
    "documents) or folders (a document a file).",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Inputs = Annotated[list[str], typer.Argument(metavar="INPUT...", help="JSON lines, text files, folders of text files")]
TextKey = Annotated[str, typer.Option(help="the field of JSON lines that holds the text")]
MaxBad = Annotated[
    float, typer.Option(help="give up if a larger share of the documents (of a folder's bytes) is unusable")
]


class Kind(str, Enum):
    bpe = "bpe"
    sentencepiece = "sentencepiece"


def main() -> None:
    """Entry point: errors that a user can mend are one message and an exit code, never a traceback."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        app()
    except SLMError as error:
        typer.echo(f"{error.title}: {error}", err=True)
        sys.exit(error.exit_code)


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
    processes: Annotated[int | None, typer.Option(help="default: one a core; any number gives the same bytes")] = None,
    text_key: TextKey = "text",
    max_bad_fraction: MaxBad = 0.01,
    shard_bytes: Annotated[str, typer.Option(help="text per shard, such as 64M; a kill costs one at most")] = "auto",
) -> None:
    """Encode text into token shards. Killed, it goes on by the same command."""
    from data_prep.shards import make_shards, summarise

    try:
        result = make_shards(
            inputs,
            tokenizer,
            output,
            validation_fraction=validation_fraction,
            processes=processes,
            text_key=text_key,
            max_bad_fraction=max_bad_fraction,
            shard_bytes=None if shard_bytes == "auto" else _count("--shard-bytes", shard_bytes),
        )
    except KeyboardInterrupt:
        typer.echo("stopped; what is finished is kept, and the same command goes on", err=True)
        sys.exit(130)
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


def _count(option: str, text: str) -> int:
    from slm.recipe import parse_count

    try:
        return parse_count(text)
    except ValueError as error:
        raise UserError(f"{option}: {error}", fix="write it as 200M or 64Mi") from None


if __name__ == "__main__":
    main()
