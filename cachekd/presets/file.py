"""The file: a pipeline's YAML with a comment for every choice, to be read from top to bottom."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from textwrap import wrap
from typing import Any

import yaml

from cachekd.atomic import require_place, write_file
from cachekd.check.memory import PART_NAMES
from cachekd.errors import CachekdError
from cachekd.pipeline import expand, read_pipeline
from cachekd.presets.cards import ROOM, SAMPLES, room_of
from cachekd.presets.cost import BYTES_PER_TOKEN
from cachekd.presets.pairs import NOT_RUN
from cachekd.presets.proposal import Proposal

FILE = "pipeline.yaml"
_WIDTH = 100
_DATA, _TEST = "data/train", "data/test"
# What each setting is there for, as the file says it.
_WHY = {
    "student_dtype": "the student's weights and gradients take half of the memory. Steps are rounded at "
    "random, so that small ones are not lost",
    "training": "AdamW's moments in 8 bits take a quarter of the memory: pip install 'cachekd[quantization]'",
    "teacher_quantization": "of the teacher while the student trains. The cache is still of the plain "
    "teacher. pip install 'cachekd[quantization]'",
    "student_quantization": "of the student's own weights, which do not train (QLoRA)",
    "lora": "small matrices beside the student's weights train, and are merged in the end: pip install "
    "'cachekd[peft]'",
    "learning_rate": "adapters take larger steps than whole weights (2e-5, the default)",
    "batch_size": "samples that go through the models at a time",
    "gradient_accumulation": f"batches that make one step of the optimizer, of {SAMPLES} samples",
    "gradient_checkpointing": "layers are computed again in the backward: slower, with far less memory",
}


def refuse_existing(folder: Path) -> None:
    """Nothing is overwritten, and what cannot be written is known before a step is computed.

    Raises:
        CachekdError: the folder has a pipeline already, or cannot have one.
    """
    path = folder / FILE
    if path.exists():
        raise CachekdError(
            "there is a pipeline already, and nothing is overwritten",
            where=str(path),
            fix=f"`cachekd run {quote(str(path))}` runs it; for a new one name another folder, or move this "
            "one",
        )
    require_place(path)


def write(proposal: Proposal, folder: Path, command: str) -> Path:
    """Write the file, and read it back as `cachekd run` does.

    Args:
        folder: the pipeline's, with its steps' folders later.
        command: that writes it, for its head.

    Raises:
        CachekdError: there is such a file already, or it cannot be written.
    """
    refuse_existing(folder)
    path = folder / FILE
    write_file(path, text_of(proposal, folder, command).encode())
    expand(read_pipeline(path))
    return path


def text_of(proposal: Proposal, folder: Path, command: str) -> str:
    """The file's text."""
    lines = [*_head(proposal, folder, command), *_defaults(proposal, folder), *_steps(proposal)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def memory_lines(proposal: Proposal) -> list[tuple[str, str]]:
    """A training step's memory by part, in GB: what it is, and how much."""
    memory = proposal.here.memory
    if memory is None:
        return []
    return [(title, f"{getattr(memory, part) / 1e9:,.2f}") for part, title in PART_NAMES.items()]


def changes(proposal: Proposal, card: int) -> str:
    """What is set otherwise on another card, in a line."""
    ours, theirs = proposal.here, proposal.chosen[card]
    said, gone = [], []
    for old, new in ((ours.train, theirs.train), (ours.dump, theirs.dump)):
        for name in dict.fromkeys((*old, *new)):
            if old.get(name) == new.get(name):
                continue
            if name not in new or new[name] is False:
                gone.append(f"`{name}`")
            else:
                said.append(f"{name}: {_value(new[name])}")
    if gone:
        said.insert(0, f"leave out {', '.join(gone)}")
    memory = "" if theirs.memory is None else f"; {theirs.memory.peak / 1e9:.1f} GB at the most"
    return (", ".join(said) or "the same settings") + memory


def _head(proposal: Proposal, folder: Path, command: str) -> Iterator[str]:
    pair, teacher, student = proposal.pair, proposal.teacher, proposal.student
    pipeline = quote(str(folder / FILE))
    yield f"# {teacher.name} teaches {student.name}, on a card of {proposal.card} GB."
    yield f"# Written by: {command}"
    yield "#"
    if pair is not None and pair.prepare:
        yield "# First:"
        yield from (f"#   {line}" for line in pair.prepare)
        yield "# Then:"
    bridge = " --switch-bridge linear" if proposal.fit.switch == "linear" else ""
    yield "#   # Do they fit? No weights are read."
    yield f"#   cachekd check --teacher {quote(teacher.name)} --student {quote(student.name)} \\"
    yield f"#     --data {quote(proposal.data or _DATA)}{bridge}"
    yield "#   # All of it. The same command again goes on where it was stopped; --status shows what is done."
    yield f"#   cachekd run {pipeline}"
    if pair is not None:
        yield "#"
        unverified = [
            f"{side.name}: {', '.join(side.unverified)}" for side in (teacher, student) if side.unverified
        ]
        yield from _comment(f"{NOT_RUN}. `cachekd check` looks at the real ones.")
        if unverified:
            yield from _comment(
                "Values of the shapes for which no source was found: " + "; ".join(unverified) + "."
            )
    yield "#"
    yield from _memory(proposal)
    yield from _cost(proposal)
    yield ""


def _memory(proposal: Proposal) -> Iterator[str]:
    here, batch = proposal.here, proposal.here.train["batch_size"]
    if here.memory is None:
        yield "# What a training step holds could not be computed: `cachekd train --estimate` measures it."
        return
    yield from _comment(
        "What a training step holds, in GB, computed from the configurations and measured on no card: "
        f"{batch} sample(s) of {len(proposal.ours.encoded):,} tokens, {proposal.ours.image_tokens:,} of them "
        f"of a picture of {proposal.assumed.width} x {proposal.assumed.height} pixels."
    )
    yield from (f"#   {title:<40}{size:>8}" for title, size in memory_lines(proposal))
    yield from _comment(
        "The most is not the sum: gradients come while activations go, and a student in bfloat16 is rounded "
        "in float32, one weight matrix after the other."
    )
    yield from _comment(
        f"It may take {room_of(here.card) / 1e9:.1f} of the {here.card:g} GB: {1 - ROOM:.0%} is left to CUDA "
        "and to what is not computed."
    )
    if not here.fits:
        yield from _comment(
            "IT DOES NOT FIT, as computed here, even in the leanest way there is. Smaller pictures, "
            "`max_tokens`, `teacher_device_map: auto` (the teacher's layers in the CPU's memory) or "
            "`lambda_vsd: 0` are left."
        )


def _cost(proposal: Proposal) -> Iterator[str]:
    assumed, cost = proposal.assumed, proposal.cost
    tokens = assumed.samples * assumed.answers
    yield from _comment(
        f"Disk: {assumed.samples:,} samples x {assumed.answers} answer tokens x {BYTES_PER_TOKEN} bytes = "
        f"{cost.cache_bytes / 1e9:,.1f} GB for the cache ({tokens:,} tokens)."
    )
    yield from _comment(
        f"Time, an estimate at a sustained {cost.tflops:g} TFLOP/s: the dump "
        f"{cost.dump_seconds / 3600:,.1f} h, once; training {cost.train_seconds / 3600:,.1f} h for each pass "
        "over the data. `--estimate` measures both."
    )


def _defaults(proposal: Proposal, folder: Path) -> Iterator[str]:
    teacher, student, pair = proposal.teacher, proposal.student, proposal.pair
    yield f"out: {_value(str(folder))}"
    yield "defaults:"
    yield f"  teacher: {_value(teacher.name)}  # {teacher.size}"
    yield f"  student: {_value(student.name)}  # {student.size}"
    yield from _comment("LLaVA JSON, WebDataset tars or a Hugging Face data set: docs/how-to/data.md.", 2)
    if pair is not None:
        yield from _comment(f"Pictures: {pair.pictures}.", 2)
    yield f"  data: {_value(proposal.data or _DATA)}"
    yield "  train:"
    yield from _losses(proposal)
    train = proposal.here.train
    for name, value in train.items():
        if name == "gradient_checkpointing" and value is False:
            continue
        yield from _comment(f"{_WHY[name]}.", 4)
        yield f"    {name}: {_value(value)}"
    if "learning_rate" not in train:
        yield from _comment(
            "Other settings to try, with their defaults: learning_rate: 2.0e-5, epochs: 1, temperature: 3.0.",
            4,
        )
    for card in proposal.chosen:
        if card != proposal.card:
            yield from _comment(f"At {card} GB: {changes(proposal, card)}.", 4)
    yield ""


def _losses(proposal: Proposal) -> Iterator[str]:
    fit = proposal.fit
    why = proposal.why
    what = {
        "paper": "L_VSD is on, as in the paper: the student's visual features go into the teacher",
        "linear": "L_VSD needs a trained map between the two vision sides, which is beyond the paper",
        "none": "L_VSD is off, and no teacher is in memory while the student trains",
    }[fit.switch]
    yield from _comment(f"{what}. {why[0].upper()}{why[1:]}.", 4)
    said = proposal.losses()
    for name in ("lambda_vsd", "switch_bridge"):
        if name in said:
            yield f"    {name}: {_value(said[name])}"
    if fit.own_text:
        yield from _comment(
            "Teacher and student cut text into different tokens: L_Align compares them where both have "
            "read the same bytes, over classes of tokens (docs/how-to/across-tokenizers.md).",
            4,
        )
        yield f"    align_vocabulary: {said['align_vocabulary']}"


def _steps(proposal: Proposal) -> Iterator[str]:
    staged = proposal.pair is not None and proposal.pair.stages
    last = "dft" if staged else "student"
    yield "steps:"
    yield from _comment("The teacher reads all data once. What it says at the answers is kept.", 2)
    yield from _dump(proposal, "cache")
    if staged:
        yield from _stages(proposal)
    else:
        yield from _comment("The student learns from the cache, as often as you like.", 2)
        yield "  - step: train"
        yield "    name: student"
    yield from _baseline(proposal)
    yield from _scores(proposal, last)


def _dump(proposal: Proposal, name: str, data: str | None = None) -> Iterator[str]:
    yield "  - step: dump"
    yield f"    name: {name}"
    if data is not None:
        yield f"    data: {data}"
    if "device_map" in proposal.here.dump:
        yield from _comment(
            f"In bfloat16 the teacher is {proposal.here.teacher_bytes / 1e9:.1f} GB. What does not fit lies "
            "in the "
            "CPU's memory and is fetched in each forward: slow, and the same cache byte for byte. "
            "`quantization: "
            "8bit` in its place is faster, and another cache.",
            4,
        )
        yield "    device_map: auto"


def _stages(proposal: Proposal) -> Iterator[str]:
    yield from _comment("The same of captions, for the first stage.", 2)
    yield from _dump(proposal, "cache-captions", "data/captions")
    for stage, what, more in (
        (
            "dpt",
            "The projector alone learns from captions: the student has none that was trained.",
            ("data: data/captions", "cache: cache-captions", "learning_rate: 1.0e-3"),
        ),
        ("sft", "Projector and language model learn from the answers, without a teacher.", ()),
        ("dft", "All of it learns from the teacher, by all three terms.", ("cache: cache",)),
    ):
        yield from _comment(what, 2)
        yield "  - step: train"
        yield f"    name: {stage}"
        yield f"    stage: {stage}"
        if stage == "dpt":
            yield f"    student: {_value(proposal.student.name)}"
        yield from (f"    {line}" for line in more)


def _baseline(proposal: Proposal) -> Iterator[str]:
    yield from _comment(
        "To compare with: the same student on the same data without a teacher. Take the # away.", 2
    )
    yield "  # - step: train"
    yield "  #   name: ce"
    yield f"  #   student: {_value(proposal.student.name)}"
    yield "  #   lambda_align: 0"
    yield "  #   lambda_vsd: 0"
    if proposal.fit.switch == "linear":
        yield "  #   switch_bridge: null"


def _scores(proposal: Proposal, run: str) -> Iterator[str]:
    given = proposal.test_data is not None
    off = "" if given else "# "
    why = "" if given else " Name held-out data, and take the # away."
    yield from _comment(f"Questions that were not trained on, for the teacher too.{why}", 2)
    yield f"  {off}- step: eval"
    yield f"  {off}  name: scores"
    yield f"  {off}  data: {_value(proposal.test_data or _TEST)}"
    yield from _comment("One HTML page: curves, scores, settings.", 2)
    yield "  - step: report"
    yield "    name: page"
    yield f"    run: {run}"
    yield "    # baselines: [ce]"


def _comment(text: str, indent: int = 0) -> Iterator[str]:
    before, text = " " * indent + "# ", text[0].upper() + text[1:]
    yield from (before + line for line in wrap(text, _WIDTH - len(before), break_on_hyphens=False))


def _value(value: Any) -> str:
    """A value as YAML, in one line."""
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 0.1 else f"{value:g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_value(one)}" for name, one in value.items()) + "}"
    if isinstance(value, str):
        return yaml.safe_dump(value, width=10_000).removesuffix("...\n").strip()
    return json.dumps(value)
