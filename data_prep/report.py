"""What came of a job: the accounting over its units, the refusal where too much is unusable, the manifests, the summary.

Owns the numbers that a user sees. Always: documents read = kept + rejected + filtered + duplicates.

    result = write_manifests(settings, reports, tokenizer_info, inputs, skipped, max_bad_fraction)
    print(summarise(result))
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.corpus import human_bytes, shown
from data_prep.reading import HARMLESS, NO_FIELD
from data_prep.units import SPLITS, Settings
from slm.data.tokens import write_manifest
from slm.errors import UserError

_EXAMPLES_SHOWN = 10


@dataclass
class Result:
    """splits: the manifests. already: nothing was left to do."""

    output: Path
    splits: dict[str, dict[str, Any]]
    already: bool = False


class NothingToKeep(UserError):
    """A mistake under which no unit is of any use to the corrected command."""


def num_docs(report: dict[str, Any]) -> int:
    """Documents of a unit that were kept."""
    return sum(part["shard"]["num_docs"] for part in report["splits"].values() if part)


def _bad(rejected: dict[str, int]) -> dict[str, int]:
    return {reason: count for reason, count in rejected.items() if reason not in HARMLESS}


def readable_docs(report: dict[str, Any]) -> int:
    """Documents that could be read, whatever became of them."""
    return num_docs(report) + sum(report["filtered"].values()) + report["duplicates"]


def _bad_fraction(reports: list[dict[str, Any]]) -> float:
    """Of documents; but of bytes where files were found in folders, for source trees have a few small odd ones.

    (The tests of the Python library are 1 % of its files that are on purpose not UTF-8, and 0.1 % of its bytes.)
    """
    tree_files, tree_bytes = (sum(report["bad_tree"][i] for report in reports) for i in (0, 1))
    num_bad = sum(sum(_bad(report["rejected"]).values()) for report in reports) - tree_files
    num_good = sum(map(readable_docs, reports))
    text_bytes = sum(part["text_bytes"] for report in reports for part in report["splits"].values() if part)
    return max(num_bad / max(1, num_bad + num_good), tree_bytes / max(1, tree_bytes + text_bytes))


def stop_if_all_bad(report: dict[str, Any], max_bad_fraction: float) -> None:
    """A wrong --text-key is told after the first unit, not after a night."""
    bad = _bad(report["rejected"])
    if not readable_docs(report) and sum(bad.values()) >= 1000 and max_bad_fraction < 1:
        raise NothingToKeep(_bad_message(bad, 0, _examples([report]), "in one part "), fix=_bad_fix(bad))


def _bad_message(bad: dict[str, int], num_good: int, examples: list[str], so_far: str = "") -> str:
    num_bad = sum(bad.values())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in bad.items())
    first = "".join(f"\n  {example}" for example in examples)
    return f"{so_far}{num_bad:,} of {num_bad + num_good:,} documents cannot be used ({reasons}), first of all:{first}"


def _bad_fix(bad: dict[str, int]) -> str:
    if NO_FIELD in bad:
        return "name the field with the text by --text-key, mend the input, or raise --max-bad-fraction"
    return "mend the input, or raise --max-bad-fraction to go on without these documents"


def _examples(reports: list[dict[str, Any]]) -> list[str]:
    """The first bad documents as file:line, counted over the pieces that a file was cut into."""
    found = []
    lines_before: Counter[str] = Counter()
    for report in reports:
        firsts = []
        for path, num_lines in report["lines"]:
            firsts.append((path, lines_before[path]))
            lines_before[path] += num_lines
        for place, line, problem in report["examples"]:
            path, before = firsts[place]
            found.append(f"{shown(path)}{f':{before + line}' if line else ''}: {problem}")
            if len(found) == _EXAMPLES_SHOWN:
                return found
    return found


def _summed(reports: list[dict[str, Any]], key: str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for report in reports:
        total.update(report[key])
    return dict(sorted(total.items()))


def write_manifests(
    settings: Settings,
    reports: list[dict[str, Any]],
    tokenizer: dict[str, Any],
    inputs: list[dict[str, Any]],
    skipped: Counter[str],
    max_bad_fraction: float,
) -> Result:
    """Raises UserError, and writes nothing, if too much is unusable or nothing is left for a split."""
    output, fraction = settings.output, settings.validation_fraction
    rejected = _summed(reports, "rejected")
    bad = _bad(rejected)
    harmless = skipped + Counter({reason: count for reason, count in rejected.items() if reason in HARMLESS})
    examples, num_kept = _examples(reports), sum(map(num_docs, reports))
    if _bad_fraction(reports) > max_bad_fraction:
        kind = UserError if num_kept else NothingToKeep
        message = _bad_message(bad, sum(map(readable_docs, reports)), examples)
        raise kind(
            f"{message}\n  That is more than --max-bad-fraction {max_bad_fraction:g}: no manifest was written",
            fix=_bad_fix(bad),
        )
    filtered, num_duplicates = _summed(reports, "filtered"), sum(report["duplicates"] for report in reports)
    if not num_kept:
        why = ", ".join(f"{count:,} have {reason}" for reason, count in filtered.items())
        raise NothingToKeep(
            f"the inputs hold no documents: there is nothing to train on{f' ({why})' if why else ''}",
            fix="loosen --min-tokens and --max-tokens" if why else "give files with text",
        )
    parts = {split: [part for r in reports if (part := r["splits"][split])] for split in SPLITS}
    if not parts["train"]:
        raise NothingToKeep(
            f"all {num_kept} documents fell into validation (their hashes decide): there is nothing to train on",
            fix="give more documents, or --validation-fraction 0",
        )
    if fraction and not parts["validation"]:
        raise NothingToKeep(
            f"none of the {num_kept} documents fell into validation at --validation-fraction {fraction:g} "
            "(their hashes decide): there would be nothing to evaluate on",
            fix=f"give more documents, a larger fraction such as {min(0.5, 4 / num_kept):.2g}, or 0 for no held-out part",
        )
    engines = {part["shard"].get("engine", tokenizer["engine"]) for split in SPLITS for part in parts[split]}
    tokenizer = {**tokenizer, "engine": ", ".join(sorted(engines))}
    shared = {
        "inputs": inputs,
        "documents": {
            "read": sum(report["read"] for report in reports),
            "kept": num_kept,
            "rejected": sum(rejected.values()),
            "filtered": sum(filtered.values()),
            "duplicates": num_duplicates,
        },
        "rejected": {"bad": bad, "harmless": dict(sorted(harmless.items()))},
        "replaced": _summed(reports, "replaced"),
        "filtered": filtered,
        "deduplicated": settings.deduplicate,
        "bad_examples": examples,
        "validation_fraction": fraction,
    }
    result = Result(output, {})
    for split in reversed(SPLITS):  # train last: its manifest says that all is complete
        if parts[split]:
            result.splits[split] = write_manifest(
                output / split,
                shards=[part["shard"] for part in parts[split]],
                tokenizer=tokenizer,
                split=split,
                text_bytes=sum(part["text_bytes"] for part in parts[split]),
                length_histogram=_sum_histograms([part["length_histogram"] for part in parts[split]]),
                **shared,
            )
    return result


def _sum_histograms(histograms: list[dict[str, list[int]]]) -> dict[str, dict[str, int]]:
    """{"64": {docs, tokens}} is of documents of 64 to 127 tokens."""
    docs: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    for histogram in histograms:
        for bucket, (number, num_tokens) in histogram.items():
            docs[int(bucket)] += number
            tokens[int(bucket)] += num_tokens
    return {str(b): {"docs": docs[b], "tokens": tokens[b]} for b in sorted(docs)}


def summarise(result: Result) -> str:
    """For the screen."""
    lines = []
    for split in SPLITS:
        if (manifest := result.splits.get(split)) is None:
            continue
        num_tokens, text_bytes = manifest["num_tokens"], manifest["text_bytes"]
        lines.append(
            f"{result.output / split}: {manifest['num_docs']:,} documents, {num_tokens:,} tokens, "
            f"{human_bytes(text_bytes)} of text ({text_bytes / num_tokens:.2f} bytes per token), "
            f"{len(manifest['shards'])} shards"
        )
    train = result.splits["train"]
    for title, counts in (
        ("not used", train["rejected"]["bad"]),
        ("passed over", train["rejected"]["harmless"]),
        ("characters replaced in", train["replaced"]),
        ("filtered out", train["filtered"]),
        ("duplicates removed", {"documents": train["documents"]["duplicates"]} if train["deduplicated"] else {}),
    ):
        if counts:
            lines.append(f"{title}: " + ", ".join(f"{count:,} {reason}" for reason, count in counts.items()))
    lines += [f"  {example}" for example in train["bad_examples"]]
    names = ", ".join(f"data.{'sources' if s == 'train' else s}" for s in SPLITS if s in result.splits)
    lines.append(f"next: name these folders in a recipe ({names}) and run slm train")
    return "\n".join(lines)
