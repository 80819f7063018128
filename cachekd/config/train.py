"""The settings of stage two, and the presets of its stages.

LLaVA-KD (arXiv 2410.16236, abstract) names the stages: Distilled Pre-Training strengthens the alignment of
vision and language, Supervised Fine-Tuning gives the student its multimodal understanding, Distilled
Fine-Tuning refines what it knows. Which of V_S, P_S and L_S train in each is ours, and said in
docs/how-to/pipelines.md.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from cachekd.config.batches import BatchOptions
from cachekd.config.data import DataOptions, NamedData
from cachekd.config.fields import LATER, PARTS, SAVE_STEPS, CacheName, Dtype, ModelName, Parts, SwitchBridge
from cachekd.config.loading import TrainLoadOptions
from cachekd.config.losses import LOSSES, DBiLD, TermLoss
from cachekd.config.terms import Terms
from cachekd.config.weights import Weight, written
from cachekd.errors import CachekdError
from cachekd.losses.terms import labels, options_off
from cachekd.paths import LocalPath, PathOrName, expanded

Stage = Literal["dpt", "sft", "dft"]

# L_VSD reaches V_S alone: where a stage leaves V_S frozen, its weight is 0.
STAGES: dict[Stage, dict[str, Any]] = {
    "dpt": {"trainable": ("projector",), "lambda_align": 1.0, "lambda_vsd": 0.0},
    "sft": {"trainable": ("projector", "language_model"), "lambda_align": 0.0, "lambda_vsd": 0.0},
    "dft": {"trainable": PARTS, "lambda_align": 1.0, "lambda_vsd": 1.0},
}


_NAMES = ", ".join(LOSSES)
_TRAINERS_PATHS = ("accelerator_config", "deepspeed", "fsdp_config")  # each a file, or what would be in it


class TrainConfig(Terms, TrainLoadOptions, BatchOptions, DataOptions):
    """Stage two.

    Raises:
        CachekdError: L_VSD is on and the student's vision encoder is frozen; L_VSD is off and there is a
            bridge for it; `training` has a token in it.
    """

    # These may change between two sessions of one run. (What a stage stands for is in the others.)
    FREE: ClassVar = frozenset({"out", "on_error", "workers", "save_steps", "keep_checkpoints", "stage"}) | {
        "logit_chunk",
        "teacher_mismatch",
        "gradient_checkpointing",
        "teacher_device_map",
        "teacher_max_memory",
        "log_term_gradients",
    }

    student: ModelName
    out: LocalPath = Field(description="the run's folder: new, empty, or that of a run to resume")
    teacher: PathOrName | None = Field(None, description="model folder or hub name; needed for L_VSD")
    cache: CacheName = None
    binding: LocalPath | None = Field(
        None, description="the file that `cachekd bind` wrote, if the data have other keys than the cache"
    )
    live_teacher: bool = Field(
        False, description="run the whole teacher at every step instead of a cache, as a baseline"
    )
    missing: Literal["error", "skip", "ce-only"] = Field(
        "error",
        description="samples that the cache lacks: they stop the run, are left out, or train by L_CE alone",
    )
    eval_data: NamedData | None = Field(
        None,
        description="held-out data, on which the loss is logged while the student trains: a name, or a "
        "mapping of data options. Options of reading that it leaves out are those of `data`",
    )
    eval_cache: PathOrName | None = Field(
        None,
        description="the teacher's cache of eval_data. Without one, and without live_teacher, only L_CE and "
        "the share of right tokens are computed on them",
    )
    window: int | None = Field(
        None,
        ge=2,
        description="the most ids that Kneedle considers, in each dbild that does not set it; by default the "
        "cache's, and 128 for live_teacher",
    )
    min_k: int | None = Field(
        None, ge=2, description="the least k of each dbild; by default the cache's, and 2 for live_teacher"
    )
    stage: Stage | None = Field(
        None,
        description="presets of trainable, lambda_align and lambda_vsd: dpt (projector; L_Align), sft "
        "(projector and language model; L_CE alone), dft (everything). Each can still be set by itself",
    )
    trainable: Parts = Field(
        PARTS, description="the student's parts that train; the others stay as they are, bit by bit"
    )
    align: Annotated[TermLoss, LATER] = Field(
        DBiLD(),
        description=f"the loss of L_Align: {_NAMES}; or a mapping with settings of its own, "
        "{loss: dbild, direction: teacher}",
    )
    vsd: Annotated[TermLoss, LATER] = Field(DBiLD(), description="the loss of L_VSD, in the same form")
    align_vocabulary: Annotated[Literal["none", "cells", "exact"], LATER] = Field(
        "none",
        description="how L_Align compares a teacher and a student with different tokenizers, at places "
        "where both have read the same bytes. cells: classes of tokens of both; exact: only strings that "
        "both have; none refuses such a pair. No effect if the tokenizers are the same",
    )
    lambda_align: Weight = Field(
        1.0,
        description="weight of L_Align, beside L_CE's 1; 0 leaves the term out. Begin with the paper's 1: "
        "log_term_gradients shows whether the term does something, and one that does next to nothing needs "
        "more. Or a schedule over the steps, {schedule: linear, start: 0, end: 1, after: 0, over: 0.5}, or "
        "cosine",
    )
    lambda_vsd: Weight = Field(
        1.0,
        description="weight of L_VSD, the switched path, likewise. It trains the vision encoder, and a "
        "bridge, through the teacher's projector and language model; with 0 a cache is enough, and no "
        "teacher runs",
    )
    vsd_every: int = Field(
        1, ge=1, description="run the switched path only in every N-th optimizer step, with the same weight"
    )
    switch_bridge: SwitchBridge = None
    temperature: float = Field(
        3.0,
        gt=0,
        description="divides the logits, in each loss that has a temperature and does not set its own. A "
        "higher one gives more weight to tokens that the teacher finds unlikely. It also makes the term "
        "weaker, as no loss is multiplied by its square: raise the term's lambda too. Which is best "
        "has not been measured",
    )
    epochs: float = Field(1.0, gt=0, description="passes over the data")
    learning_rate: float = Field(2e-5, gt=0, description="AdamW's, at its peak; a cosine takes it to zero")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, per step and learning rate")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    max_grad_norm: float = Field(
        1.0, ge=0, description="L2 norm to which a larger gradient is clipped; 0: none"
    )
    seed: int = Field(0, ge=0, description="of data order and dropout")
    dtype: Dtype = Field(
        "auto",
        description="the teacher's, and autocast of the student's forward; auto: bfloat16 on a GPU, float32 "
        "on a CPU",
    )
    logging_steps: int = Field(10, ge=1, description="steps between log entries")
    log_term_gradients: bool = Field(
        False,
        description="log the size of each term's gradient at V_S, P_S and L_S with every entry, and warn of "
        "a term that does next to nothing",
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="processes that read and encode samples; by default 0 on a CPU, whose cores the steps "
        "need, and up to 4 beside a GPU",
    )
    save_steps: int = Field(SAVE_STEPS, ge=0, description="steps between checkpoints to resume from; 0: none")
    keep_checkpoints: bool = Field(
        False,
        description="keep the checkpoints of a finished run, which nothing reads; by default they are "
        "removed",
    )
    logit_chunk: int | None = Field(
        None, ge=1, description="answer tokens whose logits exist at a time; by default as many as fit 64 MiB"
    )
    gradient_checkpointing: bool = Field(
        False,
        description="recompute the student's and the teacher's layers in the backward: slower, with less "
        "memory",
    )
    lora: dict[str, Any] | None = Field(
        None, description="peft.LoraConfig's settings, such as r: 16; the student trains adapters only"
    )
    training: dict[str, Any] = Field(
        {}, description="any other field of transformers.TrainingArguments, by its own name"
    )
    eval_steps: int | None = Field(  # the last field: its default comes from others
        None,
        ge=1,
        validate_default=True,
        description="optimizer steps between evaluations on eval_data; by default save_steps. There is "
        "always one at the last step",
    )

    @field_validator("eval_steps")
    @classmethod
    def _as_save_steps(cls, value: int | None, info: ValidationInfo) -> int | None:
        """Default to `save_steps`, and record it: this decides which student is the best, and `save_steps`
        may change between two sessions of a run."""
        by_steps = info.data.get("training", {}).get("eval_strategy", "steps") == "steps"
        if value is None and info.data.get("eval_data") is not None and by_steps:
            return info.data.get("save_steps") or SAVE_STEPS
        return value

    @field_validator("training")
    @classmethod
    def _has_no_secret_and_whole_paths(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "hub_token" in value:
            raise CachekdError(
                "settings are written into the run's folder in clear, and a token is a secret",
                where="setting 'training.hub_token'",
                fix="HF_TOKEN in the environment, or `hf auth login`",
            )
        return value | {name: expanded(value[name]) for name in _TRAINERS_PATHS if name in value}

    @model_validator(mode="before")
    @classmethod
    def _on_its_stage(cls, values: Any) -> Any:
        """Beneath what is said lie the presets of the stage; a name that is no stage is refused later."""
        stage = values.get("stage") if isinstance(values, dict) else None
        return {**STAGES[stage], **values} if stage in STAGES else values

    @model_validator(mode="after")
    def _the_switched_path_trains_something(self) -> Self:
        if self.switches and "vision_encoder" not in self.trainable:
            weights = {f"lambda_{name}": self.weights[name] for name in self.switched}
            raise CachekdError(
                f"{labels(self.switched)} would have no gradient: the switched path runs through the "
                "student's vision encoder, which is frozen here, and the teacher, which always is",
                where=f"settings 'trainable' and {' and '.join(map(repr, weights))}",
                expected="vision_encoder among the parts that train",
                found=f"trainable {', '.join(self.trainable)}; "
                + ", ".join(f"{name} {written(weight)}" for name, weight in weights.items()),
                fix=f"--trainable vision_encoder,{','.join(self.trainable)} to train it too, or "
                + options_off(self.switched),
            )
        if self.switch_bridge is not None and not self.switches:
            raise CachekdError(
                "nothing would train the switch bridge: only L_VSD runs through it",
                where="settings 'switch_bridge' and 'lambda_vsd'",
                expected="lambda_vsd above 0",
                found="lambda_vsd 0",
                fix="leave --switch-bridge out, or set --lambda-vsd 1",
            )
        return self

    def require_inputs(self) -> None:
        """Refuse terms without what they are computed from.

        Raises:
            CachekdError: a cache or a teacher is missing, or there are two of them.
        """
        for name, too in (("cache", ""), ("eval_cache", ", on held-out data too")):
            if self.live_teacher and getattr(self, name) is not None:
                raise CachekdError(
                    f"a live teacher takes the place of a cache{too}",
                    where=f"settings 'live_teacher' and {name!r}",
                    fix="leave one of them out",
                )
        if self.distils and not self.live_teacher and self.cache is None:
            raise CachekdError(
                f"{labels(self.taught)} need{'s' * (len(self.taught) == 1)} the teacher's cached logits",
                where="setting 'cache'",
                fix="pass --cache (`cachekd dump` writes one), --live-teacher to run the whole teacher at "
                f"every step, or {options_off(self.taught)} for plain CE",
            )
        if self.runs_teacher and self.teacher is None:
            raise CachekdError(
                f"the student's visual features run through the teacher's projector and language model for "
                f"{labels(self.switched)}"
                if self.switches
                else "a live teacher has to be named",
                where="setting 'teacher'",
                fix=f"pass --teacher, or {options_off(self.switched)} to align the student's own path only",
            )
        for name in ("eval_cache", "eval_steps"):
            if self.eval_data is None and getattr(self, name) is not None:
                raise CachekdError(
                    f"{name!r} says how held-out data are evaluated, and there are none",
                    where=f"setting {name!r}",
                    fix="name them, --eval-data PATH, or leave it out",
                )

    def on_held_out(self) -> TrainConfig | None:
        """The run as if `eval_data` and `eval_cache` were what it trains on; None without such data."""
        if self.eval_data is None:
            return None
        data = self.eval_data.inheriting_from(self)
        settings = {name: getattr(self, name) for name in self.model_fields_set}
        settings = {name: value for name, value in settings.items() if name not in DataOptions.model_fields}
        settings |= {name: getattr(data, name) for name in data.model_fields_set}
        of_the_run = {"cache": self.eval_cache, "binding": None}
        return type(self)(**settings | of_the_run | dict.fromkeys(("eval_data", "eval_cache", "eval_steps")))

    @property
    def eval_is_taught(self) -> bool:
        """Whether there is a teacher of the held-out data, cached or live."""
        return self.eval_cache is not None or self.live_teacher

    @property
    def eval_terms(self) -> tuple[str, ...]:
        """The terms that are computed on held-out data, as far as settings tell."""
        return self._on(lambda term: self.eval_is_taught or not term.taught)

    @property
    def aligns(self) -> bool:
        """Whether a term compares the student's own logits with the teacher's."""
        return bool(self._on(lambda term: term.taught and term.path == "own"))

    @property
    def idle(self) -> set[str]:
        """See `Terms.idle`."""
        return super().idle | (set() if self.aligns else {"align_vocabulary"})

    @property
    def crosses(self) -> bool:
        """Whether teacher and student may have different tokenizers. The switched path minds none: both its
        sides are in the teacher's vocabulary."""
        return not self.aligns or self.align_vocabulary != "none"

    @property
    def runs_teacher(self) -> bool:
        """Whether the teacher itself is in memory: for the switched path, or in the cache's place."""
        return self.switches or (self.live_teacher and self.distils)
