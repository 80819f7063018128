"""The Trainer whose loss is Switch-KD's."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl
from transformers.trainer_callback import PrinterCallback

from cachekd.bridge_training import add_to_optimizer, mean_gradients, no_sharding
from cachekd.checkpoints import note_settings, saving_checkpoint
from cachekd.data_health import DataHealth, first_good
from cachekd.data_wait import DataWait, Waited
from cachekd.errors import CachekdError
from cachekd.left_out import BadSamples
from cachekd.loss_terms import TERMS, BatchTerms, LossTerms, Targets, TermSums
from cachekd.next_epoch import ReadsOn
from cachekd.not_finite import Computed, stop_if_not_finite, stop_if_weights_not_finite
from cachekd.sample_order import LengthGroups, RandomOrder
from cachekd.samples import SampleEncoder, predicting_positions
from cachekd.stopping import LastStep
from cachekd.training_arguments import SwitchKDTrainingArguments
from cachekd.training_data import IGNORE, Example, checked, collate_with_targets, reading, without_bad
from cachekd.validation.run import Validation, best_checkpoint
from cachekd.vlm import LiveTeacher, SwitchBridge, SwitchedTeacher, load_model, reach_by_text, save_processor
from cachekd.worker_loader import WorkerLoader


class SwitchKDTrainer(Trainer):
    """A Trainer whose loss is L_CE + lambda_align L_Align + lambda_vsd L_VSD (Switch-KD, section 3).

    Each term is a sum over answer tokens, divided by the number of answer tokens of a whole optimizer step,
    over all its accumulated batches and all processes. So neither accumulation nor batch size nor the number
    of processes changes the gradient.

    Args:
        student: the model to train; a VLM, or one in peft's wrapper.
        args: the Trainer's.
        train_dataset: of `cachekd.training_data.Example`.
        pad_token_id: for batches.
        encoder: the student's, whose processor is saved in each checkpoint; None: none is.
        teacher: the switched path; None where `lambda_vsd` is 0.
        live: takes the place of cached targets.
        bridge: between V_S and P_T, beyond the paper. It trains with the student (in the same optimizer,
            under the same gradient clip), and is saved in checkpoints, but is no part of it.
        lambda_align: weight of the student's own path.
        lambda_vsd: weight of the switched path.
        vsd_every: the switched path runs in every so many optimizer steps, the first among them, whatever
            step a run was resumed at. In the others the loss is what it is with `lambda_vsd` 0. The weight is
            the same wherever it runs: one that made up for the steps without would be `vsd_every` times the
            loss that the paper's weights were chosen for, under the same gradient clip.
        temperature: of DBiLD.
        logit_chunk: answer tokens whose logits exist at a time; by default what `chunk_tokens` says.
        callbacks: the Trainer's.
        validation: on held-out data, when the Trainer evaluates; there, the switched path always runs.
        settings: of the run, noted in each checkpoint; None: nothing is.

    Raises:
        CachekdError: L_VSD is on but V_S is frozen (it would have no gradient), or there is no teacher; a
            loss or a gradient that is not finite; a bridge under FSDP or DeepSpeed; a full disk.
    """

    # Losses below are divided by the tokens of the whole accumulated step already.
    loss_is_scaled_for_ga = True
    control: TrainerControl

    def __init__(
        self,
        student: nn.Module,
        args: SwitchKDTrainingArguments,
        train_dataset: Dataset,
        *,
        pad_token_id: int,
        teacher: SwitchedTeacher | None,
        encoder: SampleEncoder | None = None,
        live: LiveTeacher | None = None,
        bridge: SwitchBridge | None = None,
        lambda_align: float = 1.0,
        lambda_vsd: float = 1.0,
        vsd_every: int = 1,
        temperature: float = 3.0,
        logit_chunk: int | None = None,
        callbacks: list[TrainerCallback] | None = None,
        validation: Validation | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        if lambda_vsd > 0 and teacher is None:
            raise CachekdError("L_VSD needs a teacher to switch into", fix="pass teacher=, or lambda_vsd=0")
        if args.torch_compile and lambda_vsd > 0:
            raise CachekdError(
                "L_VSD takes what the vision encoder says out of the student's forward, which a compiled one "
                "does not give",
                where="setting 'training.torch_compile'",
                fix="leave it out, or train without the switched path: --lambda-vsd 0",
            )
        self.bad = BadSamples()
        samples, read = len(cast(Sized, train_dataset)), reading(train_dataset, self.bad)
        place, first = first_good(samples, read)
        self.health = DataHealth(samples, read)
        self.health.good(place)
        super().__init__(
            model=student,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=None if validation is None else validation.data,
            # No lambda: it goes to spawned workers.
            data_collator=partial(collate_with_targets, pad_token_id=pad_token_id, stand_in=first.encoded),
            callbacks=[*(callbacks or []), LastStep()],
        )
        self.encoder, self.validation, self.settings = encoder, validation, settings
        self.remove_callback(PrinterCallback)  # a caller's progress bar shows the same
        # Some families declare that they take no loss kwargs; then the token count would not be passed.
        self.model_accepts_loss_kwargs = True
        # The hooks go into the VLM itself; DDP and peft only wrap it.
        wrapped: Any = student
        self.vlm: PreTrainedModel = (
            student if isinstance(student, PreTrainedModel) else wrapped.get_base_model()
        )
        reach_by_text(self.vlm)
        self.teacher, self.live = teacher, live
        self.bridge = None if bridge is None else bridge.to(self.args.device)
        if bridge is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise no_sharding()
        self.weights = {"ce": 1.0, "align": lambda_align, "vsd": lambda_vsd}
        self.vsd_every = vsd_every
        tokens, positions = self._measured_on(first)
        self.terms = LossTerms(
            self.vlm,
            teacher,
            self.bridge,
            align=lambda_align > 0,
            vsd=lambda_vsd > 0,
            temperature=temperature,
            logit_chunk=logit_chunk,
            autocast=self.accelerator.autocast,
            tokens=tokens,
            positions=positions,
        )
        self._sums = TermSums(self.args.device)
        self._step: list[Computed] = []  # the batches since the optimizer's last step
        self.data_wait = DataWait()
        self._reader: ReadsOn | None = None

    def _measured_on(self, example: Example) -> tuple[dict[str, Tensor], Tensor]:
        """One sample, and where its answers are predicted; the heads are measured on it."""
        batch = self._prepare_inputs(self.data_collator([example]))
        supervised = batch.pop("labels") != IGNORE
        tokens = {name: x for name, x in batch.items() if isinstance(x, Tensor) and name != "covered"}
        return tokens, predicting_positions(supervised)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum over this batch's answer tokens, divided by the step's number of them."""
        found = self.terms_of(model, inputs)
        terms = found.terms
        self._sums.add(found)
        loss = sum((self.weights[name] * term for name, term in terms.items()), torch.zeros_like(terms["ce"]))
        self._step.append(
            Computed(loss.detach(), {name: x.detach() for name, x in terms.items()}, inputs["keys"], inputs)
        )
        tokens = torch.as_tensor(found.tokens if num_items_in_batch is None else num_items_in_batch)
        loss = loss / tokens.clamp(min=1)  # where a whole step is left out, all is 0
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # of whose gradients DDP takes the mean
        return (loss, terms) if return_outputs else loss

    def terms_of(self, model: nn.Module, inputs: dict[str, Any], *, evaluating: bool = False) -> BatchTerms:
        """The terms of one batch of `collate_with_targets`, and over how many answer tokens they are summed.

        Args:
            evaluating: see `loss_terms`.
        """
        batch = dict(inputs)
        batch.pop("keys")
        supervised = batch.pop("labels") != IGNORE
        for_teacher = batch.get("for_teacher")
        token_ids = batch["input_ids"][supervised]
        targets, covered = self._targets(batch, supervised, token_ids, evaluating)
        return self.loss_terms(model, batch, supervised, targets, covered, for_teacher, evaluating=evaluating)

    @property
    def switches(self) -> bool:
        """Whether the switched path runs in this optimizer step."""
        return self.weights["vsd"] > 0 and self.state.global_step % self.vsd_every == 0

    def _targets(
        self, batch: dict[str, Any], supervised: Tensor, token_ids: Tensor, evaluating: bool = False
    ) -> tuple[Targets | None, Tensor | None]:
        """The teacher at the answer tokens, if a term needs it; which of the N answer tokens it covers, if
        not all."""
        for_teacher = batch.pop("for_teacher", None)
        if self.live is not None:
            needed = evaluating or self.weights["align"] > 0 or self.switches
            if not len(token_ids) or not needed:
                return None, None
            seen = batch if for_teacher is None else {**for_teacher}
            where = supervised if for_teacher is None else seen.pop("supervised")
            return self.live.targets(seen, predicting_positions(where), token_ids), None
        return batch.pop("targets", None), batch.pop("covered", None)

    def loss_terms(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        supervised: Tensor,
        targets: Targets | None,
        covered: Tensor | None = None,
        for_teacher: dict[str, Tensor] | None = None,
        *,
        evaluating: bool = False,
    ) -> BatchTerms:
        """The terms that are on, each summed over answer tokens: L_CE over all N, the others over M.

        Args:
            inputs: the batch as the model takes it.
            supervised: [B, S] bool, with N true.
            targets: the teacher at M of the N tokens; None at none.
            covered: [N] bool, with M true where there are targets; None where M is N.
            for_teacher: the same batch as the teacher reads it, with its own `supervised` [B, S'] bool; only
                a switched path with a bridge looks at it.
            evaluating: the switched path runs, whatever step it is, no gradient is wanted, and the answer
                tokens whose argmax is right are counted.
        """
        switches = self.weights["vsd"] > 0 if evaluating else self.switches
        batch = (inputs, supervised, targets, covered, for_teacher)
        return self.terms(model, *batch, switches=switches, evaluating=evaluating)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """One evaluation on the held-out data, logged and reported: see `Validation`. The Trainer calls it;
        of its arguments the name's prefix alone means something.

        Raises:
            CachekdError: there are no held-out data; or what is wrong with them.
        """
        if self.validation is None:
            raise CachekdError("there are no held-out data to evaluate", fix="pass validation=")
        with self.data_wait.paused():
            metrics = self.validation(self, metric_key_prefix)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """The Trainer's; the best student so far gets a checkpoint, wherever `save_steps` falls. The one that
        training began with is not among them."""
        if self.state.global_step == 0:  # `eval_on_start`
            return False
        is_best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= is_best and self.args.load_best_model_at_end
        return is_best

    def _finalize_training(self, *args: Any) -> Any:
        """The Trainer's, which ends with the best student's checkpoint; where it lies may have another name
        than when the run began."""
        if self.args.load_best_model_at_end:
            self.state.best_model_checkpoint = best_checkpoint(self.args, self.state)
        return super()._finalize_training(*args)

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:  # the Trainer's has the fault that is said below
            self._load_from_checkpoint(best)
        if self.bridge is not None:
            self.bridge.load(Path(best))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The batches of one optimizer step. How long they took to come is counted, and what they lack."""
        if self.bridge is not None:
            self.bridge.zero_grad()  # the Trainer does it for the student alone
        batches = without_bad(self.data_wait.timed(checked(epoch_iterator)), self.bad, self.health)
        return super().get_batch_samples(batches, num_batches, device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's, with the bridge's parameters."""
        there = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if self.bridge is not None and not there:
            add_to_optimizer(optimizer, self.bridge, self.args.weight_decay)
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's; in an optimizer step's last batch the bridge's gradients become those of all."""
        loss = super().training_step(*args, **kwargs)
        if self.bridge is not None and self.switches and self.accelerator.sync_gradients:
            mean_gradients(self.bridge, self.accelerator)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(self._with_bridge(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The Trainer's; it asks for it before every step of the optimizer, whose last chance this is."""
        grad_norm = super()._get_grad_norm(self._with_bridge(model), grad_norm)
        stop_if_not_finite(self, self._step, grad_norm)
        self._step.clear()
        return grad_norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's; weights that are not finite are never saved. A checkpoint, unlike a model that a
        caller saves, has its processor beside it. (The Trainer's own way, `processing_class`, would change
        the model's special tokens to the tokenizer's.)"""
        stop_if_weights_not_finite(self)
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.encoder is not None and self.args.should_save:
            save_processor(self.encoder, Path(output_dir))

    def _with_bridge(self, model: nn.Module) -> nn.Module:
        """All parameters that one gradient norm is of."""
        return model if self.bridge is None else nn.ModuleList([model, self.bridge])

    def bad_samples(self) -> dict[str, str]:
        """Key and reason of those that were left out, in all processes, each of which has to ask."""
        self.bad.add(gather_object([self.bad.reasons]))
        return self.bad.reasons

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with saving_checkpoint(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """The Trainer's; what is written next makes the checkpoint one to go on from, so all wait until each
        process's own part is there."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.settings is not None and self.args.should_save:
            note_settings(self.settings, Path(output_dir))
        if self.bad_samples() and self.args.should_save:
            self.bad.save(Path(output_dir))
        if self.bridge is not None and self.args.should_save:
            self.bridge.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.bad.load(Path(checkpoint))
        if self.bridge is not None and checkpoint is not None:
            self.bridge.load(Path(checkpoint))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        if self.args.train_sampling_strategy == "random":
            return RandomOrder(len(data), seed=seed, epoch=self._epoch)
        if self.args.train_sampling_strategy == "group_by_length":
            in_a_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return LengthGroups(data.lengths(), in_a_step, seed=seed, epoch=self._epoch)
        return super()._get_train_sampler(train_dataset)

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's, with workers of ours: they read on from epoch to epoch."""
        loader: Any = super().get_train_dataloader()
        if type(loader.base_dataloader) is not DataLoader:
            return loader
        if loader.persistent_workers:
            loader.base_dataloader = self._reader = ReadsOn(loader.base_dataloader, self._another_epoch)
        else:
            loader.base_dataloader = WorkerLoader.like(loader.base_dataloader)
        return loader

    def _another_epoch(self) -> bool:
        return self._epoch() + 1 < self.state.num_train_epochs

    def _epoch(self) -> int:
        """Which epoch begins, or is gone on with; right in every process, after a resumption too."""
        ahead = self._reader is not None and self._reader.begins_next
        return int(self.state.epoch or 0) + ahead

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Weights of a checkpoint, by the names that `save_pretrained` gave them.

        The Trainer of transformers 5.23 loads them by the modules' names and takes no notice of those it does
        not know. LLaVA's differ, so a run would go on from its initial weights without a word.
        """
        if self.is_fsdp_enabled or self.model is not self.vlm:  # adapters keep their names
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        cpu = torch.device("cpu")
        saved = load_model(resume_from_checkpoint, dtype=self.vlm.dtype, device=cpu)
        self.vlm.load_state_dict(saved.state_dict())

    @property
    def last_terms(self) -> dict[str, float]:
        """The last logged value of each."""
        return {name: entry[name] for entry in self.state.log_history for name in TERMS if name in entry}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each term's mean per answer token since the last entry, and the share of the time since then in
        which the steps waited for data (`DataWait`), over all processes."""
        if "loss" in logs:
            wait = torch.tensor(self.data_wait.since_last(), dtype=torch.float64, device=self.args.device)
            waited = Waited(*self.accelerator.reduce(wait).tolist())
            logs = logs | self._sums.means(self.accelerator) | {"data_wait": waited.share}
        super().log(logs, start_time)
