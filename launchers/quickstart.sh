#!/usr/bin/env bash
# From nothing to a trained, evaluated, talking model on this machine's CPU, in one command:
#   bash launchers/quickstart.sh
# The corpus is the Python standard library of this machine; CORPUS=path takes any folder or file instead.
# RANKS=2 sets the number of training processes, HELD_OUT=0.02 the share of documents that is not trained on.
# Run again, it goes on from what is complete.
set -euo pipefail
if [ $# -gt 0 ]; then sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2; fi
case "${CORPUS:=}" in "" | /*) ;; *) CORPUS=$PWD/$CORPUS ;; esac # as seen from where the command is given
cd "$(dirname "$0")/.."
source launchers/environment.sh

ensure_system_packages g++ || true # only torch.compile and optimiser offload want a compiler; the quickstart does not
ensure_environment
started=$SECONDS
case "${HELD_OUT:=0.02}" in 0 | 0.0 | .0) echo "HELD_OUT is 0: the quickstart evaluates on held-out documents; give 0.2, say" >&2; exit 2 ;; esac
case "${RANKS:=2}" in '' | *[!0-9]* | 0) echo "RANKS is '$RANKS': give the number of processes, 1 or more" >&2; exit 2 ;; esac
# On the CPU also where there are GPUs: the figures of this page are a CPU's. DS_ACCELERATOR=cuda RANKS=1 uses a GPU.
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"

corpus="${CORPUS:-$(python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')}"
# Each corpus has its own folders, so that one quickstart does not stand in the way of the next.
name=quickstart
if [ -n "$CORPUS" ]; then
  base=${CORPUS%/} base=${base##*/} # a newline in it must not get into the name either
  name+=-$(printf %.50s "$base" | LC_ALL=C tr -c 'A-Za-z0-9_' '_')-$(cksum <<<"$CORPUS" | cut -d' ' -f1)
fi
work=artifacts/$name
run=runs/$name
step() { printf '\n== %s\n' "$*"; }
trap 'printf "\nstopped. The same command goes on from what is complete; to begin anew, remove %s and %s\n(--validation-fraction is HELD_OUT=%s here, --output is chosen)\n" "$PWD/$work" "$PWD/$run" "$HELD_OUT" >&2' ERR

step "1/6 tokenizer: byte-level BPE with 4,096 entries, learned from $corpus"
slm-data tokenizer "$corpus" --vocab-size 4096 --max-bytes 20M --max-bad-fraction 0.05 --output $work/tokenizer

step "2/6 token shards, a share of $HELD_OUT of the documents held out"
slm-data shards "$corpus" --tokenizer $work/tokenizer --validation-fraction "$HELD_OUT" --max-bad-fraction 0.05 --output $work/tokens

step "3/6 training on $RANKS ranks with DeepSpeed ZeRO-2 (recipes/quickstart.yaml)"
bash launchers/local.sh recipes/quickstart.yaml "$RANKS" "name=$name" "tokenizer=$work/tokenizer" \
  "data.sources.corpus=$work/tokens/train" "data.validation.corpus=$work/tokens/validation"

step "4/6 held-out loss of the best checkpoint"
slm eval $run --max-sequences 128

step "5/6 text from a prompt"
slm generate $run "def __init__(self" --max-new-tokens 96 --temperature 0.7 --seed 1

step "6/6 distillation: a student a fifth as large learns from a cache of what the model says (recipes/distill.yaml)"
student="{preset: cpu-small, hidden_size: 96, num_hidden_layers: 2, intermediate_size: 256}"
part=()
if [ -d "$corpus" ]; then # a few documents suffice: every fortieth text file
  mapfile -d '' -t part < <(find "$corpus" -name site-packages -prune -o -name __pycache__ -prune -o -type f -size -1000k \
    \( -name '*.py' -o -name '*.txt' -o -name '*.md' -o -name '*.json*' -o -name '*.html' -o -name '*.rst' \) -print0 |
    sort -z | awk 'BEGIN { RS = ORS = "\0" } NR % 40 == 1')
fi
if [ ${#part[@]} -gt 0 ]; then
  distill=("name=$name-distilled" "model=$student" "teacher.model=$run" "tokenizer=$work/tokenizer"
    "data.sources={part: '$work/part/train'}" "data.validation={corpus: '$work/tokens/validation'}"
    phases.main.tokens=240Ki phases.main.seq_len=256 phases.main.batch_tokens=4Ki phases.main.micro_batch=8
    eval.every_steps=0 eval.max_sequences=64 checkpoint.every_steps=100)
  # What step 2 has held out stays out. Where none of it is among these few documents, that is refused, and there is nothing to hold out.
  shards=(slm-data shards "${part[@]}" --tokenizer $work/tokenizer --max-bad-fraction 0.05 --output $work/part)
  if ! [ -e $work/part/train/manifest.json ]; then
    "${shards[@]}" --validation-fraction "$HELD_OUT" 2>/dev/null || { rm -rf "$work/part"; "${shards[@]}" --validation-fraction 0; }
  fi
  slm teacher recipes/distill.yaml "${distill[@]}"
  slm teacher stats recipes/distill.yaml "${distill[@]}"
  bash launchers/local.sh recipes/distill.yaml "$RANKS" "${distill[@]}"
else
  echo "left out: $corpus is no folder of text files; recipes/distill.yaml says how it is done"
fi

cat <<END

== done in $((SECONDS - started)) seconds
  tokenizer     $work/tokenizer
  token shards  $work/tokens/{train,validation}
  the run       $run      (metrics.jsonl, checkpoints/, best, latest)
What next:
  source .venv/bin/activate
  slm generate $run "import os" --max-new-tokens 200
  bash launchers/local.sh $run/recipe.yaml 2 name=longer phases.main.tokens=8M
  slm export $run my-model    # a folder for transformers
  slm plan recipes/llama3.2-1b.yaml --ranks 8
END
