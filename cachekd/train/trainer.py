"""The Trainer whose loss is Switch-KD's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from cachekd.data import SampleEncoder
from cachekd.data.loader import WorkerLoader
from cachekd.errors import CachekdError
from cachekd.models import load_model, save_processor
from cachekd.models.bridge import add_to_optimizer, mean_gradients, no_sharding
from cachekd.train.arguments import SwitchKDTrainingArguments
from cachekd.train.batch import Batch, batch_of
from cachekd.train.callbacks import DataWait, LastStep, Waited
from cachekd.train.checkpoints import KeepBest, best_checkpoint, note_settings, saving_checkpoint
from cachekd.train.cost import CostMeter
from cachekd.train.data import Feed
from cachekd.train.not_finite import Computed, stop_if_not_finite, stop_if_weights_not_finite
from cachekd.train.order import ReadsOn, order_of, token_loader
from cachekd.train.reach import ProveGradients
from cachekd.train.rounding import rounds_at_random
from cachekd.train.sums import BatchTerms, TermSums, each_divided, term_tokens
from cachekd.train.term_gradients import TermGradients
from cachekd.train.terms import LossTerms
from cachekd.train.validation import Validation


class SwitchKDTrainer(Trainer):
    """A Trainer whose loss is L_CE + lambda_align L_Align + lambda_vsd L_VSD (Switch-KD, section 3): the
    weighted sum of the terms in `cachekd.losses.terms.TERMS`.

    Each term is a sum over answer tokens, divided by the answer tokens of a whole optimizer step: neither
    accumulation nor batch size nor the number of processes changes the gradient. Across tokenizers each term
    has answer tokens of its own (`AlignedRows.divisors`).

    Args:
        terms: of the student to train.
        args: the Trainer's.
        train_dataset: of `cachekd.train.batch.Example`.
        pad_token_id: for batches.
        encoder: the student's, whose processor is saved in each checkpoint; None: none is.
        callbacks: the Trainer's.
        validation: on held-out data, when the Trainer evaluates; there, the switched path always runs.
        settings: of the run, noted in each checkpoint; None: nothing is.
        log_term_gradients: each entry of the log has the size of each term's gradient (`TermGradients`); of
            several processes the first one's.

    Raises:
        CachekdError: a term of the switched path is on but V_S is frozen (it would have no gradient), or
            compiled; a gradient that is nowhere, or not finite; a bridge under FSDP or DeepSpeed; no room.
    """

    # Losses below are divided by the tokens of the whole accumulated step already.
    loss_is_scaled_for_ga = True
    control: TrainerControl

    def __init__(
        self,
        terms: LossTerms,
        args: SwitchKDTrainingArguments,
        train_dataset: Dataset,
        *,
        pad_token_id: int,
        encoder: SampleEncoder | None = None,
        callbacks: list[TrainerCallback] | None = None,
        validation: Validation | None = None,
        settings: dict[str, Any] | None = None,
        log_term_gradients: bool = False,
    ) -> None:
        if args.torch_compile:
            terms.require_uncompiled()
        self.feed = Feed(train_dataset, pad_token_id)
        super().__init__(
            model=terms.student,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=None if validation is None else validation.data,
            data_collator=self.feed.collate,
            callbacks=[*(callbacks or []), LastStep(), KeepBest(), ProveGradients(self)],
        )
        self.remove_callback(PrinterCallback)  # a caller's progress bar shows the same
        # Some families declare that they take no loss kwargs; then the token count would not be passed.
        self.model_accepts_loss_kwargs = True
        self.encoder, self.validation, self.settings = encoder, validation, settings
        self.terms, self.vlm, self.teacher, self.bridge = terms, terms.vlm, terms.teacher, terms.bridge
        if self.bridge is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise no_sharding()
            self.bridge.to(self.args.device)
        first = self._on_device(batch_of([self.feed.first], pad_token_id))
        terms.prepare(first, self.accelerator.autocast)
        self._sums = TermSums(self.args.device)
        self.gradients = TermGradients.of(self) if log_term_gradients else None
        self._step: list[Computed] = []  # the batches since the optimizer's last step
        self.data_wait = DataWait()
        self.cost = CostMeter(processes=args.world_size, uncounted=self._uncounted())
        self._reader: ReadsOn | None = None

    # ---- the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum over this batch's answer tokens, divided by the step's number of them.

        Args:
            num_items_in_batch: of the step, as `get_batch_samples` has it.
        """
        found = self.terms_of(model, inputs)
        self._sums.add(found)
        weights = self.terms.weights_at(*self._now())
        if self.gradients is not None:
            self.gradients.measure(found, weights)
        weighted = {name: weights[name] * term for name, term in found.terms.items()}
        loss = sum(weighted.values(), torch.zeros_like(found.terms["ce"]))
        terms = {name: term.detach() for name, term in found.terms.items()}
        self._step.append(Computed(loss.detach(), terms, inputs))
        alone = found.tokens if self.terms.across is None else term_tokens([found.divisors])
        tokens = torch.as_tensor(alone if num_items_in_batch is None else num_items_in_batch)
        tokens = tokens.clamp(min=1)  # where a whole step is left out, all is 0
        loss = each_divided(weighted, tokens) if tokens.ndim else loss / tokens
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # of whose gradients DDP takes the mean
        return (loss, found.terms) if return_outputs else loss

    def terms_of(self, model: nn.Module, batch: Batch, *, evaluating: bool = False) -> BatchTerms:
        """The terms of one batch that this step has, each summed over answer tokens, and over how many.

        Args:
            evaluating: all that are on are computed, whatever step it is, no gradient is wanted, and the
                answer tokens whose argmax is right are counted.
        """
        names = None if evaluating else self.terms.names_at(*self._now())
        return self.terms(model, self._on_device(batch), names, evaluating=evaluating)

    def _now(self) -> tuple[int, int]:
        """Which optimizer step it is, from 0 on, and of how many."""
        return self.state.global_step, self.state.max_steps

    def _on_device(self, batch: Batch) -> Batch:
        """Where the student is; accelerate has moved the batches of its own loaders there before."""
        batch = batch.to(self.args.device, non_blocking=self.args.dataloader_pin_memory)
        tensors = self._prepare_inputs(batch.student.tensors)  # DeepSpeed's student has a dtype of its own
        return replace(batch, student=replace(batch.student, tensors=tensors))

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each term's mean per answer token since the last entry, the weight in the step before of a term
        that has a schedule, and the share of the time since then in which the steps waited for data
        (`DataWait`), over all processes."""
        if "loss" in logs:
            wait = torch.tensor(self.data_wait.since_last(), dtype=torch.float64, device=self.args.device)
            waited = Waited(*self.accelerator.reduce(wait).tolist())
            logs = logs | self._sums.means(self.accelerator) | {"data_wait": waited.share}
            logs |= self.terms.scheduled_at(max(0, self.state.global_step - 1), self.state.max_steps)
            logs |= {} if self.gradients is None else self.gradients.logged()
        super().log(logs, start_time)

    # ---- the step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The batches of one optimizer step. How long they took to come is counted, and what they lack.

        Returns:
            they, and what sums are divided by: the answer tokens of all; across tokenizers [T] int64, those
            of each term in `TERMS`. Over all processes, if `average_tokens_across_devices` says so.
        """
        if self.bridge is not None:
            self.bridge.zero_grad()  # the Trainer does it for the student alone
        batches = self.feed.batches(self.data_wait.timed(epoch_iterator))
        found, tokens = super().get_batch_samples(batches, num_batches, device)
        if self.terms.across is None or tokens is None:
            return found, tokens
        tokens = term_tokens(each.aligned.divisors for each in found if each.aligned).to(device)
        if self.args.average_tokens_across_devices:
            tokens = self.accelerator.reduce(tokens)
        return found, tokens

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the Trainer's, with the bridge's parameters in it; it rounds bfloat16 weights at random."""
        there = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if self.bridge is not None and not there:
            add_to_optimizer(optimizer, self.bridge, self.args.weight_decay)
        rounds_at_random(optimizer, self.args.seed, lambda: self.state.global_step)
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's; in an optimizer step's last batch the bridge's gradients become those of all."""
        tokens, names = args[1]["input_ids"].numel(), self.terms.names_at(*self._now())
        measured = self.gradients is not None and self.gradients.measures(names)
        kind = "+".join(names) + " measured" * measured
        with self.cost.batch(tokens, self.state.global_step, kind):
            loss = super().training_step(*args, **kwargs)
        switches = not set(self.terms.switched).isdisjoint(names)
        if self.bridge is not None and switches and self.accelerator.sync_gradients:
            mean_gradients(self.bridge, self.accelerator)
        return loss

    def _uncounted(self) -> str | None:
        """Why floating point operations cannot be counted, if so."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return "weights are sharded"
        return "the student is compiled" if self.args.torch_compile else None

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Overridden, as the Trainer clips the parameters of the student alone: one norm is of the bridge's
        too."""
        return super()._clip_grad_norm(self._with_bridge(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Overridden, as it alone knows a step's gradient norm before the optimizer's step (callbacks are not
        told of it), where one that is not finite has to stop the run."""
        grad_norm = super()._get_grad_norm(self._with_bridge(model), grad_norm)
        stop_if_not_finite(self, self._step, grad_norm)
        self._step.clear()
        return grad_norm

    def _with_bridge(self, model: nn.Module) -> nn.Module:
        """All parameters that one gradient norm is of."""
        return model if self.bridge is None else nn.ModuleList([model, self.bridge])

    # ---- the data's order

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's, with workers of ours: they read on from epoch to epoch."""
        ours = token_loader(self.args, self.train_dataset, self.feed.collate, self._epoch, self.accelerator)
        loader: Any = super().get_train_dataloader() if ours is None else ours
        if type(loader.base_dataloader) is not DataLoader:
            return loader
        if loader.persistent_workers:
            loader.base_dataloader = self._reader = ReadsOn(
                loader.base_dataloader, goes_on=lambda: self._epoch() + 1 < self.state.num_train_epochs
            )
        else:
            loader.base_dataloader = WorkerLoader.like(loader.base_dataloader)
        return loader

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """Overridden, as the Trainer's orders are not the same in every process after resuming
        (`cachekd.train.order`), and no argument takes a sampler."""
        ours = order_of(self.args, self.train_dataset, self._epoch)
        return super()._get_train_sampler(train_dataset) if ours is None else ours

    def _epoch(self) -> int:
        """Which epoch begins, or is resumed; right in every process, after a resumption too."""
        ahead = self._reader is not None and self._reader.begins_next
        return int(self.state.epoch or 0) + ahead

    # ---- checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's; weights that are not finite are never saved. A checkpoint, unlike a model that a
        caller saves, has beside it all that a run goes on from. (The Trainer's own way for a processor,
        `processing_class`, would change the model's special tokens to the tokenizer's.)"""
        stop_if_weights_not_finite(self)
        super().save_model(output_dir, _internal_call)
        if not _internal_call or output_dir is None:
            return
        bad, checkpoint = self.feed.all_bad(), Path(output_dir)
        aligned = None if self.terms.across is None else self.feed.notes.of_all()
        if self.args.should_save:
            if self.encoder is not None:
                save_processor(self.encoder, checkpoint)
            if self.settings is not None:
                note_settings(self.settings, checkpoint)
            self.cost.save(checkpoint)
            if bad:
                self.feed.bad.save(checkpoint)
            if aligned is not None:
                self.feed.notes.save(aligned, checkpoint)
            if self.bridge is not None:
                self.bridge.save(checkpoint)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; what `save_model` put into a checkpoint is resumed too. At its end, whichever,
        no worker is left."""
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        if checkpoint:
            self.feed.bad.load(Path(checkpoint))
            self.feed.notes.load(Path(checkpoint))
            self.cost.load(Path(checkpoint))
            if self.bridge is not None:
                self.bridge.load(Path(checkpoint))
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self._reader is not None:
                self._reader.stop()
            if self.gradients is not None:
                self.gradients.end()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Overridden, as a disk that is full must leave no half of a checkpoint, whichever file was the last
        to find room; callbacks come too late."""
        with saving_checkpoint(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """Overridden, as what the Trainer writes next makes the checkpoint one to go on from: all wait until
        each process's own part is there."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Overridden, as the Trainer of transformers 5.23 loads weights by the modules' names, not by those
        that `save_pretrained` gave them, and takes no notice of names that it does not know. LLaVA's differ,
        so a run would go on from its initial weights without a word."""
        if self.is_fsdp_enabled or self.model is not self.vlm:  # adapters keep their names
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = load_model(resume_from_checkpoint, dtype=self.vlm.dtype, device=torch.device("cpu"))
        self.vlm.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        """Overridden for the same fault, and as the best student's bridge comes back with it."""
        best = str(best_checkpoint(self.args, self.state))
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(best)
        if self.bridge is not None:
            self.bridge.load(Path(best))
