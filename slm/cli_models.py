"""The commands that measure a model and take it in and out: `slm eval`, `slm import`, `slm export`.

Owns their arguments and what they print, as cli.py does for the others.

    slm eval runs/demo --suite hellaswag --limit 100
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from slm.errors import EnvironmentProblem, UserError

ModelPath = Annotated[str, typer.Argument(metavar="MODEL", help="a run, a checkpoint, or a Hugging Face folder")]
TokenizerPath = Annotated[str, typer.Option(help="tokenizer, if the model's own recipe names none")]


def evaluate(
    model: ModelPath,
    data: Annotated[
        list[Path] | None,
        typer.Argument(help="folders of token shards, else the recipe's validation; with --text: text files"),
    ] = None,
    seq_len: Annotated[
        int, typer.Option(min=0, help="tokens of a packed sequence, of a window, of the context; 0: the model's own")
    ] = 0,
    micro_batch: Annotated[int, typer.Option(min=1, help="sequences per forward pass")] = 4,
    max_sequences: Annotated[int, typer.Option(min=0, help="at most this many per source; 0: all")] = 0,
    by_position: Annotated[bool, typer.Option("--by-position", help="also the loss by tokens seen")] = False,
    recall: Annotated[
        bool, typer.Option("--recall", help="also pass keys hidden in the data, as eval.recall of the recipe says")
    ] = False,
    lengths: Annotated[str, typer.Option(metavar="N,N", help="recall: tokens of a sample, such as 1Ki,4Ki")] = "",
    keys: Annotated[str, typer.Option(metavar="N,N", help="recall: needles in a sample, such as 1,4")] = "",
    depths: Annotated[
        int | None, typer.Option(min=1, help="recall: parts of the text that the needle stands in")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="recall: samples for each length, depth and keys")] = None,
    text: Annotated[
        bool, typer.Option("--text", help="MODEL FILE…: perplexity, bits per byte and per character of any text")
    ] = False,
    stride: Annotated[int, typer.Option(min=0, help="text: tokens between windows; 0: half of one")] = 0,
    detokenise: Annotated[str, typer.Option(metavar="wikitext", help="text: undo WikiText's spaces first")] = "",
    suite: Annotated[
        str, typer.Option(metavar="NAME,NAME", help="benchmarks of lm-evaluation-harness, such as hellaswag,gsm8k")
    ] = "",
    tasks: Annotated[list[Path] | None, typer.Option(help="suite: a folder with YAML files of tasks of yours")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="suite: examples in the prompt")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="suite: only so many documents of each")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="suite: folder for results and answers, which a killed one goes on from (RUN/eval)"),
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code-execution", help="suite: run programs that the model writes (HumanEval, MBPP)")
    ] = False,
    tokenizer: TokenizerPath = "",
    plot: Annotated[Path | None, typer.Option(help="draw loss by position and recall, as .png, .svg or .pdf")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs: everything, by position too")] = False,
) -> None:
    """Loss and perplexity on held-out token shards, by position too, and what is found again in a long context; of any text
    (--text); and benchmarks (--suite). See docs/benchmarks.md."""
    of_shards = {
        "--max-sequences": max_sequences, "--by-position": by_position, "--recall": recall, "--lengths": lengths,
        "--keys": keys, "--depths": depths, "--samples": samples, "--plot": plot is not None,
    }  # fmt: skip
    of_text = {"--text": text, "--stride": stride, "--detokenise": detokenise}
    of_suite = {
        "--suite": suite, "--tasks": tasks, "--num-fewshot": num_fewshot is not None, "--limit": limit,
        "--output": output is not None, "--allow-code-execution": allow_code,
    }  # fmt: skip
    if suite:
        _refuse("--suite", {**of_shards, **of_text, "a folder or file after MODEL": data})
        _suite(
            model, _listed(suite), output, as_json, tokenizer=tokenizer, rows=micro_batch, max_length=seq_len,
            num_fewshot=num_fewshot, limit=limit, task_folders=tasks or [], allow_code=allow_code,
        )  # fmt: skip
        return
    if text:
        _refuse("--text", {**of_shards, **of_suite})
        from slm import text_loss

        measured = text_loss.evaluate_text(
            model,
            data or [],
            seq_len=seq_len,
            stride=stride,
            rows=micro_batch,
            detokenise=detokenise,
            tokenizer=tokenizer,
        )
        if measured is not None and as_json:
            typer.echo(json.dumps([m.as_dict() for m in measured], indent=2))
        elif measured is not None:
            text_loss.draw(measured)
        return
    _refuse("the loss on shards", of_suite | of_text, "add --suite NAME or --text, which it is for")
    from slm.pictures import check_picture
    from slm.runtime import lasting_imports

    fields = {"lengths": _listed(lengths), "keys": _listed(keys), "depths": depths, "samples": samples}
    given = {name: value for name, value in fields.items() if value}
    if given and not recall:
        raise UserError(f"--{next(iter(given))} has no effect without --recall", fix="add --recall")
    if plot is not None:
        check_picture(plot)
    with lasting_imports():
        from slm import findings
        from slm.loading import evaluate_model
    folders = [str(path) for path in data or []]
    found, per_byte = evaluate_model(
        model, folders, seq_len, micro_batch, max_sequences, recall=given if recall else None, tokenizer=tokenizer
    )
    if plot is not None:
        findings.plot(found, plot)
    if as_json:
        typer.echo(json.dumps(findings.as_dict(found, per_byte), indent=2))
    else:
        findings.draw(found, per_byte, by_position=by_position)


def _refuse(what: str, options: dict[str, Any], fix: str = "leave it out, or give two commands") -> None:
    if given := [name for name, value in options.items() if value]:
        raise UserError(f"{given[0]} has no effect on {what}", fix=fix)


def _suite(model: str, names: list[str], output: Path | None, as_json: bool, **options: Any) -> None:
    try:
        from slm import suite
    except ImportError as error:
        raise EnvironmentProblem(
            f"--suite needs lm-evaluation-harness, which is not here ({error})", fix='pip install -e ".[eval]"'
        ) from None
    from slm.loading import run_of

    place = run_of(model)
    folder = output or (place.folder / "eval" if place is not None else None)
    answers = None if folder is None else folder / "answers"
    found = suite.evaluate_suite(model, names, answers=answers, **options)
    if found is None:  # a rank that has served
        return
    if folder is not None:
        path = suite.write(found, folder, place)
        typer.echo(f"wrote {path}", err=True)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        suite.draw(found)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def import_model(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a Hugging Face folder of a Llama-family model")],
    output: Annotated[Path, typer.Argument(help="folder to write")],
    tokenizer: Annotated[str, typer.Option(help="tokenizer files from elsewhere, if FOLDER has none")] = "",
) -> None:
    """Check a Hugging Face folder to its last number, and write it as one that init_from, teachers and all else here take."""
    from slm.importing import describe, import_folder

    typer.echo(describe(import_folder(folder, output, tokenizer), output))


def export(
    model: ModelPath,
    output: Annotated[Path, typer.Argument(help="folder to write")],
    tokenizer: Annotated[str, typer.Option(help="tokenizer, if it is a Python class: module:Class")] = "",
) -> None:
    """Write a run's best (or the named) checkpoint as a Hugging Face folder in float32, with its tokenizer and a model card."""
    from slm.loading import export_model

    export_model(model, output, tokenizer)
    typer.echo(
        f"wrote {output}: load it with transformers' AutoModelForCausalLM or SLMForCausalLM.from_pretrained; "
        "say its license in README.md"
    )
