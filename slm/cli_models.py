"""The commands for a model that is there: `slm eval`, `slm generate`, `slm import`, `slm export`, `slm quantize`.

Owns their arguments and what they print, as cli.py does for the others.

    slm eval runs/demo --suite hellaswag --limit 100
"""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from slm.errors import EnvironmentProblem, UserError
from slm.runtime import said_once

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
        _text(
            model, data or [], as_json, seq_len=seq_len, stride=stride, rows=micro_batch, detokenise=detokenise,
            tokenizer=tokenizer,
        )  # fmt: skip
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
    measured = evaluate_model(
        model, folders, seq_len, micro_batch, max_sequences, recall=given if recall else None, tokenizer=tokenizer
    )
    if measured is None:  # a rank that has done its share
        return
    found, per_byte = measured
    if plot is not None:
        findings.plot(found, plot)
    if as_json:
        typer.echo(json.dumps(findings.as_dict(found, per_byte), indent=2))
    else:
        findings.draw(found, per_byte, by_position=by_position)


def _refuse(what: str, options: dict[str, Any], fix: str = "leave it out, or give two commands") -> None:
    if given := [name for name, value in options.items() if value]:
        with said_once():
            raise UserError(f"{given[0]} has no effect on {what}", fix=fix)


def _suite(model: str, names: list[str], output: Path | None, as_json: bool, **options: Any) -> None:
    try:
        from slm import suite
    except ImportError as error:
        with said_once():
            raise EnvironmentProblem(
                f"--suite needs lm-evaluation-harness, which is not here ({error})", fix='pip install -e ".[eval]"'
            ) from None
    from slm.afterwards import keep
    from slm.loading import run_of

    place = run_of(model)
    folder = output or (place.folder / "eval" if place is not None else None)
    answers = None if folder is None else folder / "answers"
    found = suite.evaluate_suite(model, names, answers=answers, **options)
    if found is None:  # a rank that has served
        return
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        suite.draw(found)
    if folder is not None:
        typer.echo(f"wrote {keep('suite', found, suite.values_of(found), folder, place)}", err=True)


def _text(model: str, files: list[Path], as_json: bool, **options: Any) -> None:
    from slm import text_loss
    from slm.afterwards import keep
    from slm.distill.models import fingerprint_of
    from slm.loading import run_of

    measured = text_loss.evaluate_text(model, files, **options)
    if measured is None:  # a rank that has done its share
        return
    if as_json:
        typer.echo(json.dumps([m.as_dict() for m in measured], indent=2))
    else:
        text_loss.draw(measured)
    if (place := run_of(model)) is not None:
        found = {
            "model": model,
            "fingerprint": fingerprint_of(model),
            "results": {m.name: m.as_dict() for m in measured},
        }
        path = keep("text", found, text_loss.values_of(measured), place.folder / "eval", place)
        typer.echo(f"wrote {path}", err=True)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def generate(
    model: ModelPath,
    prompt: Annotated[list[str] | None, typer.Argument(help="text to continue; several give a batch")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="a prompt a line, or .jsonl with `prompt`; answers are JSON lines"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="prompts: file of the answers, which the same command goes on with"),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="prompts: so many at once  [default: 16]")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="turn by turn on the terminal")] = False,
    tokenizer: TokenizerPath = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens to add at most")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="only the k likeliest; 0 for all")] = 0,
    top_p: Annotated[float, typer.Option(help="only the likeliest that make up this probability")] = 0.95,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="for the same text again")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="by torch.compile: slow to begin with; for thousands of tokens on a GPU")
    ] = False,
) -> None:
    """Continue a prompt, which is shown token by token; or a file of prompts (--prompts); or chat (--chat)."""
    given = [name for name, value in {"PROMPT": prompt, "--prompts": prompts, "--chat": chat}.items() if value]
    if len(given) != 1:
        raise UserError(
            f"{' and '.join(given)} at once" if given else "there is nothing to continue",
            fix="give a text, or --prompts FILE, or --chat",
        )
    if prompts is None:
        _refuse(given[0], {"--output": output is not None, "--batch": batch}, "use it with --prompts")
    from slm.runtime import lasting_imports

    with lasting_imports():
        from slm.loading import load_for_text, stop_ids

    if prompts is not None:
        from slm.prompts import read_prompts

        asked = read_prompts(prompts)
    loaded, text = load_for_text(model, tokenizer)
    options: dict[str, Any] = dict(
        max_new_tokens=max_new_tokens,
        temperature=temperature or 1.0,
        top_k=top_k,
        top_p=top_p,
        do_sample=temperature > 0,
        stop_ids=stop_ids(model),
        compiled=compiled,
    )
    if chat:
        from slm.chat import Chat, find_template

        Chat(loaded, text, template=find_template(Path(model)), seed=seed, **options).run()
    elif prompts is not None:
        from slm.distill.models import fingerprint_of
        from slm.prompts import answer

        about = {"weights": fingerprint_of(model)} if output is not None else {}
        began = time.monotonic()
        num, tokens = answer(loaded, text, asked, output, batch=batch or 16, about=about, seed=seed, **options)
        seconds = time.monotonic() - began
        kept = f" ({len(asked) - num} were there)" if num < len(asked) else ""
        rate = f"; {tokens} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s" if num else ""
        typer.echo(f"{num} answers{kept}{rate}", err=True)
    else:
        _continue(loaded, text, prompt or [], seed=seed, **options)


def _continue(model: Any, tokenizer: Any, prompts: list[str], **options: Any) -> None:
    from slm.completion import generate_text

    begun = False

    def echo_prompt(_row: int, _text: str) -> None:  # with the first text: what is wrong with the options comes before
        nonlocal begun
        if not begun and len(prompts) == 1:
            typer.echo(prompts[0], nl=False)
        begun = True

    outputs = generate_text(model, tokenizer, prompts, stream=len(prompts) == 1, on_text=echo_prompt, **options)
    if len(prompts) > 1:
        for asked, answer in zip(prompts, outputs, strict=True):
            typer.echo(f"--- {asked}\n{answer}")


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


def quantize(
    model: ModelPath,
    output: Annotated[Path, typer.Argument(help="folder to write")],
    data: Annotated[
        list[Path] | None,
        typer.Argument(
            help="measure on these folders of token shards, else the recipe's validation; with --text: text files"
        ),
    ] = None,
    bits: Annotated[int, typer.Option(help="4 or 8 for each weight")] = 4,
    group_size: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="weights of a row that share a scale, 0: the whole row; else 64 with 4 bits (32 or 16 where it must), 0 with 8",
        ),
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings/--no-embeddings", help="embeddings and head too, else they have 16 bits")
    ] = True,
    text: Annotated[bool, typer.Option("--text", help="MODEL OUTPUT FILE…: measure on any text")] = False,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="perplexity before and after")] = True,
    max_sequences: Annotated[
        int | None,
        typer.Option(min=0, help="measure on at most this many per source; 0: all (not with --text)  [default: 64]"),
    ] = None,
    tokenizer: TokenizerPath = "",
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Write a model's weights in 4 or 8 bits, as a folder that `slm generate` and `slm eval` take, and tell what it cost."""
    if bits not in (4, 8):
        raise UserError(f"--bits is {bits}: weights have 4 or 8", fix="give --bits 4 or --bits 8")
    if text and not data:
        raise UserError("--text has no file", fix="slm quantize MODEL OUTPUT FILE… --text")
    of_measuring = {str(data[0]) if data else "": data, "--max-sequences": max_sequences is not None}
    if not measure:
        _refuse("--no-measure", of_measuring, "leave one of them out")
    if text:
        _refuse("--text", {"--max-sequences": max_sequences is not None}, "leave it out: texts are measured whole")
    from slm import quantize as quantizing
    from slm.model.quantized_files import Quantization

    report = quantizing.quantize(
        model, output, Quantization(bits, group_size, embeddings), data=[str(path) for path in data or []], text=text,
        measure=measure, max_sequences=64 if max_sequences is None else max_sequences, tokenizer=tokenizer,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        quantizing.draw(report)
        typer.echo(f"wrote {output}: slm generate {shlex.quote(str(output))} PROMPT; say its license in README.md")
