"""The training loop, the same for every method."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from sdtune.config.sections import Run, UserError
from sdtune.config.untrusted import echo
from sdtune.data import positions
from sdtune.publish.publish import Publisher
from sdtune.recipes.recipe import Recipe, TrainingConfig
from sdtune.run import artefacts, checkpoints, folder, rng
from sdtune.run.barrier import store_barrier
from sdtune.run.device import is_out_of_memory
from sdtune.run.environment import environment
from sdtune.run.live_report import recorded
from sdtune.run.metrics import Metrics, check_trackers
from sdtune.run.plan import plan, steps_of
from sdtune.run.processes import ProcessGroupWatch, resume_command
from sdtune.run.signals import StopSignals
from sdtune.training import optim, out_of_memory, preview
from sdtune.training.accelerator import start_accelerator
from sdtune.training.engine import nan_unless_finite
from sdtune.training.engines import make_engine
from sdtune.training.log_window import Window
from sdtune.training.prepare import prepare_modules
from sdtune.training.profile import Profile
from sdtune.training.repeated import RepeatedSteps
from sdtune.training.scoring import Best, Scorer
from sdtune.training.state import State


def train(
    kind: type[Recipe], cfg: TrainingConfig, words: list[str], overwrite: bool = False, allow_change: bool = False
) -> None:
    """Train a recipe and write its artefact to ``cfg.output_dir``; continue the run that is already there.

    Args:
        words: the command that trains this recipe, such as ``["lora"]``, to tell how to continue.

    Raises:
        UserError: something in the settings, the data or the folder has to change; nothing was lost.
        RunFailed: the run cannot go on; its last checkpoint is complete.
        SystemExit: 143 or 130 when SIGTERM or Ctrl-C came, and the run was saved.
    """
    check_trackers(cfg.report_to)
    with StopSignals() as stop:
        accelerator = start_accelerator(cfg)
        rank, world, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
        resume = resume_command(cfg, words)
        with ProcessGroupWatch(rank, world, cfg.output_dir, resume, cfg.ddp_timeout, stop) as watch:
            publisher = Publisher(cfg, main)
            with open_folder(cfg, words, overwrite, allow_change) if main else nullcontext():
                store_barrier()
                try:
                    fit(kind, cfg, accelerator, publisher, words, allow_change, stop)
                except (RuntimeError, MemoryError) as error:
                    if cfg.deterministic and "deterministic" in str(error):
                        raise UserError(f"--deterministic: {str(error).split('.')[0]}; leave it out") from error
                    if not is_out_of_memory(error):
                        raise
                    error.with_traceback(None)  # it holds the frames whose tensors fill the memory
                    stop.defer(False)  # no step is left to finish, and the estimates may take a minute
                    raise out_of_memory.failure(kind, cfg, accelerator.device, world, error) from None
                watch.leave()
                accelerator.end_training()
                publisher.finish()  # the other processes are free by now: none waits for an upload


def fit(
    kind: type[Recipe],
    cfg: TrainingConfig,
    accelerator: Accelerator,
    publisher: Publisher,
    words: list[str],
    allow_change: bool,
    stop: StopSignals,
) -> None:
    rank, world, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    log: Callable[[str], None] = echo if main else lambda line: None
    out = cfg.output_dir
    stop.connect(world, cfg.ddp_timeout)

    # What trains, on what, and where the run stands
    torch.manual_seed(rng.key(cfg.seed, "init"))
    recipe = kind(cfg, accelerator.device)
    batch_size, accumulation = cfg.train_batch_size, cfg.gradient_accumulation_steps
    group = batch_size * accumulation * world  # images per optimizer step
    dataset = recipe.dataset(group, log)
    stream = dataset.stream
    total = steps_of(cfg, stream)
    prepare_modules(recipe, cfg, accelerator.device)
    engine = make_engine(recipe, cfg, accelerator)
    recipe.total_steps = total
    identity = {"group": group, "data": stream.images.fingerprint, "phase_steps": recipe.phase_steps}
    state = State(cfg, recipe, engine, accelerator, identity, total)
    optimizer = state.optimizer
    peaks, lr_factor = [float(g["lr"]) for g in optimizer.param_groups], optim.lr_schedule(cfg, total)
    group_end_steps = [g.get("stop_fraction", 1.0) * total for g in optimizer.param_groups]
    scale = group if cfg.scale_lr else 1
    state.restore(allow_change, log)
    recipe.step = state.step
    best = Best(cfg, state.step)
    over = state.step >= total or best.exhausted
    if over and artefacts.artefact(out, state.step) and (out / "report.html").exists():
        log(f"{out}: trained for {state.step} steps already; --steps trains on, --overwrite starts anew")
        return
    trained, workers = sum(p.numel() for p in state.weights.values()), cfg.loader_workers(dataset.reads_images)
    log(plan(cfg, stream, total, world, peaks, trained, workers))
    if state.step and (jump := optim.rate_jump(cfg, state.step, state.planned, total)):
        log(jump)
    if engine.summary:
        log(engine.summary)
    scorer = Scorer(cfg, dataset, accelerator) if cfg.evaluate_steps else None
    if scorer:
        log(scorer.plan(total, total * group))
    metrics = Metrics(cfg, accelerator, state.step, total)
    sampler = positions(state.step, total - state.step, batch_size, accumulation, rank, world)
    pinned = accelerator.device.type == "cuda"
    loader = DataLoader(cast(Dataset[Any], dataset), batch_sampler=sampler, num_workers=workers, pin_memory=pinned)
    batches = iter(loader)
    window = Window(accelerator, state.skipped, state.step)
    repeated = RepeatedSteps(engine, recipe, cfg) if cfg.cuda_graphs else None
    profile = Profile(cfg.profile if main else 0, out, log)

    def attempt(work: Callable[[], Any]) -> Any:
        return stop.attempt(work, engine.holds_all)

    def validate() -> None:
        recipe.eval()
        with metrics.paused(), state.evaluating():
            if cfg.num_validation_images:
                if (drawn := preview.sample_images(recipe, dataset, accelerator, attempt)) is not None:
                    metrics.images(state.step, *drawn)
                store_barrier()
            if dataset.holdout:
                figures = preview.holdout(engine, dataset, accelerator, attempt)
                if not stop.agreed():
                    metrics.log(state.step, figures)
        recipe.train()

    def evaluate() -> None:
        if scorer is None or (state.step % cfg.evaluate_steps and state.step < total):
            return
        recipe.eval()
        with metrics.paused():
            with state.evaluating():
                figures = scorer.measure(recipe, attempt)
                if figures is not None and dataset.holdout and cfg.keep_best == "holdout_loss":
                    figures |= preview.holdout(engine, dataset, accelerator, attempt)
            if figures is not None and not stop.agreed():
                metrics.log(state.step, figures)
                if best.update(state.step, figures):
                    with state.export_weights() as exported:
                        if main:
                            artefacts.export_best(exported, out, state.step)
                    store_barrier()
        recipe.train()

    @torch.no_grad()
    def report() -> None:
        # A run may not end with a skipped step; only in fp16 a short one may end soon after its scale was found
        limit = 1 if state.step == total and not engine.overflows else min(cfg.max_bad_steps, total)
        metrics.log(state.step, window.line(state.step, norm, float(optimizer.param_groups[0]["lr"]), limit))
        state.skipped = window.skipped

    # Train
    recipe.train()
    if state.step == 0:
        validate()
    if not best.measured:
        evaluate()
    stop.defer(True)
    while state.step < total and not best.exhausted and not stop.agreed():
        # fp16 overflows as a matter of course until its scale is found: such steps do not move the schedule
        effective_step = state.step - (window.skipped_so_far() if engine.overflows else 0)
        for parameters, peak, end in zip(optimizer.param_groups, peaks, group_end_steps, strict=True):
            optim.set_rate(parameters, peak * scale * lr_factor(effective_step) * (state.step < end))
        with nullcontext() if repeated else engine.accumulating():
            for micro in range(accumulation):
                with metrics.times.part("data_wait"):
                    batch = stop.attempt(batches.__next__, world == 1)
                if batch is None:
                    break
                samples = batch.pop("name")
                rng.seed_model(
                    rng.key(cfg.seed, "dropout", state.step, rank * accumulation + micro), accelerator.device
                )
                with engine.local() if micro + 1 < accumulation else nullcontext():
                    received = engine.receive(batch)
                    if repeated:
                        with metrics.times.part("graph"):
                            loss, figures = repeated(received)
                    else:
                        with metrics.times.part("forward"):
                            loss, figures = engine(received)
                        with metrics.times.part("backward"):
                            engine.backward(nan_unless_finite(loss.mean()))
                window.add(loss, figures, samples)
        if batch is None:  # a signal came while the batch was read; what was accumulated is dropped
            continue
        # A rate of 0 alone does not hold every optimizer, and a part that has ended does not count in the clipping
        for parameters, end in zip(optimizer.param_groups, group_end_steps, strict=True):
            if state.step >= end:
                optim.drop_gradients(parameters)
        with metrics.times.part("optimizer"):
            norm = engine.step(optimizer, cfg.max_grad_norm)
            window.end_step(norm)
            recipe.step = state.step = state.step + 1
            recipe.after_step()
            if state.average:
                state.average.update(state.step)
        profile.end_step()
        metrics.advance(state.step)
        evaluate()  # before saving: what a killed run has measured after its last checkpoint, it measures again
        over = state.step == total or best.exhausted
        saving = over or (cfg.checkpointing_steps and state.step % cfg.checkpointing_steps == 0)
        if saving or state.step % cfg.log_steps == 0:
            report()
        if cfg.export_steps and state.step % cfg.export_steps == 0:
            state.check_weights()
            # Before saving, so that none is missing after a kill
            with metrics.paused(), state.export_weights() as exported:
                if main:
                    artefacts.export_copy(exported, out, state.step)
            store_barrier()
        if saving:
            with metrics.paused():
                state.save()
                publisher.checkpoint(state)
                store_barrier()
        if cfg.validation_steps and state.step % cfg.validation_steps == 0 and not over:
            validate()

    # Make way, or finish
    del batches  # and its workers
    profile.close()
    if state.step < total and not best.exhausted:
        if window.steps:
            report()
        state.save()
        metrics.close()
        log(f"interrupted at step {state.step} of {total} and saved; continue with: {resume_command(cfg, words)}")
        sys.exit(128 + stop.number)
    stop.defer(False)
    validate()
    metrics.close()
    with state.export_weights() as exported:
        files = artefacts.export_last(exported, out, state.step) if main else []
    if main:
        report_file = metrics.report.finish(state.step)
        if best.exhausted:
            log(f"ended at step {state.step}: {cfg.patience} scores in a row were not better (--patience)")
        if cfg.keep_best:
            log(artefacts.describe_best(out, state.step))
        log(f"wrote {', '.join(str(out / name) for name in artefacts.entries(out, files))}\nreport: {report_file}")


@contextmanager
def open_folder(cfg: Run, words: list[str], overwrite: bool, allow_change: bool) -> Iterator[None]:
    """Context with the run's folder locked, swept and described; see ``folder.open_run``."""
    with folder.open_run(cfg, words, overwrite, allow_change), recorded(cfg.output_dir):
        folder.make_folders(cfg.output_dir)
        checkpoints.sweep(cfg.output_dir / "checkpoints")
        (cfg.output_dir / "environment.json").write_text(json.dumps(environment(), indent=1), encoding="utf-8")
        yield
