"""Every message of the package, side by side: the text as a user reads it, and what brings it about.

A message names the parameter or the place, the value found, what was expected, and the line to write or the way out.
``...`` stands for what varies. The last test reads the package's source, so a message without a row here fails.
"""

from __future__ import annotations

import io
import os
import re
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Lit, loader
from lightning.pytorch.callbacks import BackboneFinetuning, EMAWeightAveraging, ModelPruning, StochasticWeightAveraging
from sentences import ROOMS, sentences
from torch import nn
from torch.nn.utils import parametrizations, prune
from triggers import (
    FIRST,
    Attending,
    Bare,
    Fetching,
    Forgetful,
    Idle,
    InSetup,
    Looking,
    NoisyLinear,
    Normed,
    Outer,
    Placed,
    Pretrained,
    Replaces,
    Stateful,
    Tied,
    WithoutLength,
    adapted,
    averaged_checkpoint,
    base,
    beside,
    by_peft,
    changed,
    changed_checkpoint,
    checkpoint,
    checkpoint_without_names,
    clip_weights,
    damaged,
    diverged,
    dividing,
    fail,
    filled_from,
    fit,
    fit_again_after_dropping,
    flipped,
    full_checkpoint,
    gradient_in_parts,
    groups,
    in_int4,
    in_mixed_batches,
    in_place,
    leave,
    leaving,
    load_state_of_other_groups,
    merge_square,
    merge_tied,
    net,
    of_two_saves,
    on_two_devices,
    over_trainable,
    packed,
    packed_convolution,
    raised_note,
    removed,
    repeated,
    requeue,
    resume,
    resume_after_one_batch,
    saved,
    seen_inputs,
    set_up,
    sharded,
    split_optimizer,
    stored,
    strategy,
    tied,
    trainer,
    twice,
    two_networks,
    two_tables,
    while_merged,
    with_attribute,
    with_random_states,
    without_alpha,
    without_config,
    without_file,
    without_matplotlib,
    written,
)

from lightning_lora import (
    AdaLoRA,
    AdapterEMA,
    AdapterError,
    DeltaLoRA,
    DoRA,
    DyLoRA,
    HiRA,
    LoRA,
    LoRACallback,
    LoRADrop,
    LoRAFA,
    ReLoRA,
    VeRA,
    inject,
    load_adapter,
    load_from_checkpoint,
    merge_,
    param_groups,
    rank_curve,
    recommend_targets,
    remove,
    save_adapter,
    sites,
    start_from_data,
    truncate_,
    use,
)
from lightning_lora.callbacks.audit import Audit
from lightning_lora.callbacks.averaging import check_divided
from lightning_lora.callbacks.guards import (
    check_connected,
    check_frozen,
    check_frozen_dtype,
    check_launcher,
    check_present,
    check_scaled,
    check_strategy,
    check_unwrapped,
)
from lightning_lora.callbacks.silent_batches import silent_losses
from lightning_lora.derived_groups import split
from lightning_lora.files import _places, _read, parse_json, read_json, read_tensors
from lightning_lora.full_fingerprint import full_digest
from lightning_lora.importance import importances
from lightning_lora.input_statistics import InputStatistics, input_statistics
from lightning_lora.layout import Layout
from lightning_lora.merge import _Loss, _warn_of
from lightning_lora.offline import export, inspect, merge
from lightning_lora.optim import place, the_optimizer
from lightning_lora.quantized import check_requantizable, keep_differentiable
from lightning_lora.rank_curve import RankCurve
from lightning_lora.report import plot_importances, plot_ranks
from lightning_lora.sharing import share
from lightning_lora.strategies import LoRAFSDP2Strategy, LoRAFSDPStrategy
from lightning_lora.strategies.base_weights import fill_base
from lightning_lora.strategies.blocks import blocks_of, kept_whole
from lightning_lora.strategies.ddp import LoRADDPStrategy
from lightning_lora.whole_files import write_file, write_folder

HEADER = b"\x27" + bytes(7) + b'{"a": {"data_offsets": [0, %d], "x": 0}}'
MESSAGES: dict[tuple[str, type[Exception]], dict[str, Callable[[], object]]] = {
    ("methods/lora", ValueError): {
        "lora_bias=True is not supported, because it computes something else than plain LoRA: merge it into the "
        "base with PEFT": lambda: LoRA.from_peft({"peft_type": "LORA", "lora_bias": True}),
        "init_lora_weights='pissa' changed the base's weights too: convert it to plain LoRA with PEFT's "
        "save_pretrained(..., path_initial_model_for_weight_conversion=...)": (
            lambda: LoRA.from_peft({"peft_type": "LORA", "init_lora_weights": "pissa"})
        ),
    },
    ("methods/delta_lora", ValueError): {
        "dropout=0.1: with dropout on the adapter's input the gradient of lora_B @ lora_A is not that of the base's "
        "weight, which Delta-LoRA takes it for: use dropout=0": lambda: DeltaLoRA(dropout=0.1),
        "update_ratio=-1: must be a finite number of at least 0, such as update_ratio=2": (
            lambda: DeltaLoRA(update_ratio=-1)
        ),
        "start_step=-2: must be a whole number of at least -1, which changes the base from the first step on; "
        "start_step=500 leaves 501 steps plain": lambda: DeltaLoRA(start_step=-2),
        "in_place=True: first.weight is a Parameter of torch.bfloat16, to which the change cannot be added without "
        "loss: use in_place=False, which computes the same and leaves the base alone": (
            lambda: in_place(net().bfloat16())
        ),
        "in_place=True: first.weight is no parameter, to which the change cannot be added without loss: use "
        "in_place=False, which computes the same and leaves the base alone": (
            lambda: in_place(net(first=nn.utils.parametrizations.weight_norm(nn.Linear(4, 8))))
        ),
    },
    ("methods/hira", ValueError): {
        "gradient='lora_pro' is derived for a change that is scale * B @ A, and HiRA's is W times that: use "
        "gradient='plain'": lambda: HiRA(gradient="lora_pro"),
    },
    ("methods/vera", ValueError): {
        "d_init=0: must be a finite number other than 0, at which b would get no gradient, for example d_init=0.1": (
            lambda: VeRA(d_init=0)
        ),
        "projection_seed=-1: must be a whole number of at least 0, such as 0": lambda: VeRA(projection_seed=-1),
        "save_projection=1: must be True or False": lambda: VeRA(save_projection=1),  # type: ignore[arg-type]
        "magnitude=2: must be True (DVoRA) or False (VeRA)": lambda: VeRA(magnitude=2),  # type: ignore[arg-type]
        "alpha=8.0: VeRA has no alpha / r scale: leave alpha_pattern out": (
            lambda: inject(net(), VeRA(), alpha_pattern={"first": 8.0})
        ),
        "first.weight has r=3 and second.weight has r=256: VeRA has no per-layer rank, because all layers share A and "
        "B: leave rank_pattern out": lambda: inject(net(), VeRA(), rank_pattern={"first": 3}),
        "second.weight is 3 x 8, but the projections that its task shares were drawn for at most 8 x 4, and larger "
        "ones would be other random numbers for every layer: give all target_modules to the first call, or give this "
        "one another task name": lambda: [inject(model := net(), VeRA(), ["first"]), inject(model, VeRA(), ["second"])],
        "its projections are not in it, and projection_seed=0 draws others with PyTorch ... than with 1.13, which "
        "wrote it: load it there and save it with save_projection=True": (
            lambda: VeRA().redrawn({"out_features": 2, "in_features": 2, "torch": "1.13", "sha256": "0"})
        ),
    },
    ("method", ValueError): {
        "r=0: the rank must be a whole number of at least 1, for example r=8": lambda: LoRA(r=0),
        "alpha=-1: must be a finite number above 0, for example alpha=16": lambda: LoRA(alpha=-1),
        "dropout=1.5: must be at least 0 and below 1, for example dropout=0.05": lambda: LoRA(dropout=1.5),
        "scaling='cubic': must be 'linear' (alpha / r) or 'rsqrt' (alpha / sqrt(r))": (
            lambda: LoRA(scaling="cubic")  # type: ignore[arg-type]
        ),
        "r=0: the rank must be a whole number of at least 1, for example r=256": lambda: VeRA(r=0),
        "beta1=1: must be at least 0 and below 1, for example beta1=0.1": lambda: AdaLoRA(beta1=1),
        "dropout=-1: must be at least 0 and below 1, for example dropout=0.05": lambda: VeRA(dropout=-1),
        "alpha=0: must be a finite number above 0, for example alpha=16": lambda: AdaLoRA(alpha=0),
        "scaling=None: must be 'linear' (alpha / r) or 'rsqrt' (alpha / sqrt(r))": (
            lambda: AdaLoRA(scaling=None)  # type: ignore[arg-type]
        ),
        "the adapters of LoRA share nothing that is drawn again": lambda: LoRA().redrawn({}),
    },
    ("methods/dora", ValueError): {
        "dropout_on='base': must be 'change' (all that is not the base, as in the paper) or 'branch' (lora_B @ lora_A "
        "alone)": lambda: DoRA(dropout_on="base"),  # type: ignore[arg-type]
    },
    ("methods/dylora", ValueError): {
        "gradient='lora_pro': a step trains a prefix, and this mixes the gradients of all columns: use "
        "gradient='plain'": lambda: DyLoRA(gradient="lora_pro"),
        "rank=0: must be a whole number of at least 1, such as rank=4": lambda: truncate_(net(), 0),
        "Sequential has no DyLoRA adapter, and of another one a prefix means nothing: train with DyLoRA, or see "
        "rank_curve for the best approximations of a lower rank": lambda: truncate_(nn.Sequential(adapted()), 2),
    },
    ("methods/relora", ValueError): {
        "dropout=0.1: what is folded counts as part of the base, whose input is not dropped: use dropout=0": (
            lambda: ReLoRA(dropout=0.1)
        ),
        "gradient='fa' keeps the inverse of a frozen lora_A, which a restart draws anew: use gradient='plain'": (
            lambda: ReLoRA(gradient="fa", freeze_A=True)
        ),
        "restart_every=0: must be a whole number of at least 1": lambda: ReLoRA(restart_every=0),
        "warmup=-1: must be a whole number of at least 0": lambda: ReLoRA(warmup=-1),
        "prune=2: must be from 0 to 1, such as prune=0.99": lambda: ReLoRA(prune=2),
    },
    ("preconditioners", ValueError): {
        "gradient='newton': must be one of plain, fa, riemannian, lora_pro": (
            lambda: LoRA(gradient="newton")  # type: ignore[arg-type]
        ),
        "gradient='fa' is for a frozen A: use LoRAFA(gradient='fa'), or gradient='lora_pro'": (
            lambda: LoRA(gradient="fa")
        ),
        "gradient='lora_pro' is for a trained A: with a frozen one use gradient='fa'": (
            lambda: LoRAFA(gradient="lora_pro")
        ),
    },
    ("data_starts", ValueError): {
        "the adapters of task 'default' do not start from data: inject LoRA(init='eva') or LoRA(init='lora_ga')": (
            lambda: start_from_data(adapted(), [])
        ),
        "first.weight: init='lora_ga' takes the gradient of the weight, and this one is packed or computed: use "
        "init='eva', or leave it out with exclude_modules": (
            lambda: start_from_data(
                adapted(net(first=parametrizations.spectral_norm(nn.Linear(4, 8))), LoRA(r=1, init="lora_ga")), [], abs
            )
        ),
    },
    ("callbacks/data_starts", UserWarning): {
        "1 matrices keep LoRA's own start (first: net.idle.weight), because the batches did not reach them, or "
        "init='eva' cannot see what goes into them": lambda: fit(Idle(), method=LoRA(r=1, init="eva"), audit=False),
    },
    ("initialisations", ValueError): {
        "init='svd': must be one of kaiming, gaussian, orthogonal, pissa, milora, olora, eva, lora_ga, or "
        "pissa_niter_16 with any number of rounds": lambda: LoRA(init="svd"),
        "r=3: init='orthogonal' gives half of the rank to each factor: use an even r": (
            lambda: LoRA(r=3, init="orthogonal")
        ),
        "init_batches=0: must be a whole number of at least 1, for example init_batches=8": (
            lambda: LoRA(init="eva", init_batches=0)
        ),
        "init_similarity=99: must be from 0 to 1, for example init_similarity=0.99": (
            lambda: LoRA(init="eva", init_similarity=99)
        ),
        "rank_spread=0.5: must be a finite number of at least 1, at which no rank changes": (
            lambda: LoRA(init="eva", rank_spread=0.5)
        ),
        "rank_spread=2 is for init='eva', which has measures of directions to go by": lambda: LoRA(rank_spread=2),
        "first.weight: r=5: init='pissa' takes 5 directions of a matrix, and this one is 8 x 4: give it a smaller rank "
        "by rank_pattern, or leave it out with exclude_modules": lambda: inject(net(), LoRA(r=5, init="pissa")),
    },
    ("methods/adalora", ValueError): {
        "mask_every=0: must be a whole number of at least 1, for example mask_every=8": lambda: AdaLoRA(mask_every=0),
        "orthogonality=-1: must be finite and not below 0, for example 0.1": lambda: AdaLoRA(orthogonality=-1),
        "sensitivity='step': must be 'post_step' (released code) or 'pre_step' (the paper)": (
            lambda: AdaLoRA(sensitivity="step")  # type: ignore[arg-type]
        ),
        "total_steps=None: AdaLoRA lowers ranks along the run, and this run has no end: give Trainer(max_steps=...), "
        "or AdaLoRA(total_steps=...)": lambda: AdaLoRA().schedules([], "default"),
    },
    ("rank_allocation", ValueError): {
        "initial_steps=4 and final_steps=6 leave no step of total_steps=10 in which ranks fall: shorten them, leave "
        "them out (a quarter of the run each), train longer, or give total_steps where this run is a part of a longer "
        "one": lambda: AdaLoRA(initial_steps=4, final_steps=6).schedules([], "default", 10),
        "target_r=8 for 2 matrices is 16 ranks at the end, but r and rank_pattern give 4 at the start: lower target_r "
        "or raise r": lambda: AdaLoRA(r=2).schedules(inject(net(), AdaLoRA(r=2)), "default", 10),
    },
    ("methods/lora_drop", ValueError): {
        "sample_ratio=1: must be above 0 and below 1, for example sample_ratio=0.1": lambda: LoRADrop(sample_ratio=1),
        "sample_steps=0: must be a whole number of at least 1, for example sample_steps=8": (
            lambda: LoRADrop(sample_steps=0)
        ),
        "threshold=0: must be above 0 and at most 1, for example threshold=0.9": lambda: LoRADrop(threshold=0),
        "rest='half': must be 'shared', 'shared_frozen' or 'none'": (
            lambda: LoRADrop(rest="half")  # type: ignore[arg-type]
        ),
        "rank_spread=2: two rank allocators on one budget": lambda: LoRADrop(init="eva", rank_spread=2),
        "init='eva' with reinit=True: adapters that start anew would start as LoRA's own, without the data: use "
        "reinit=False": lambda: LoRADrop(init="eva"),
        "magnitude=True with rest='shared': a shared low-rank pair with per-layer magnitudes is ambiguous: use "
        "rest='none'": lambda: LoRADrop(magnitude=True),
        "sample_ratio=0.1 is a share of the run, and this run has no end: give Trainer(max_steps=...), or "
        "LoRADrop(sample_steps=...)": lambda: LoRADrop().schedules([], "default"),
    },
    ("importance", ValueError): {
        "LoRADrop measures what adapters add to outputs, and 1 matrices (first: net.self_attn.out_proj.weight) are "
        "read by their layer's forward, where that cannot be seen (attention's out_proj, recurrent layers, experts): "
        "leave them out with exclude_modules=['net.self_attn.out_proj'], or use LoRA": (
            lambda: fit(Attending(), method=LoRADrop(r=2))
        ),
        "what the adapter of first.weight adds is not finite: the run has diverged, lower its learning rate": (
            lambda: (model := adapted(), importances(model, [torch.full((1, 4), float("nan"))], model))
        ),
    },
    ("sharing", ValueError): {
        "kept='third': no site has this name; the model's are first.weight, second.weight": (
            lambda: share(adapted(), ["third"])
        ),
        "task='default': its method is LoRA, which does not say what the others get: "
        "inject(model, LoRADrop(rest='shared')) first": lambda: share(adapted(), ["first.weight"]),
    },
    ("callbacks/dropping", UserWarning): {
        "LoRA-drop selected in an earlier run: its selection stays and no sample is taken. For a new one call "
        "remove(module) before the fit": lambda: raised_note("callbacks.dropping", fit_again_after_dropping),
    },
    ("plots", ImportError): {
        "plot_importances draws with matplotlib: pip install 'lightning-lora[plots]'": (
            lambda: without_matplotlib(partial(plot_importances, {"first.weight": 1.0}))
        ),
        "plot_ranks draws with matplotlib: pip install 'lightning-lora[plots]'": (
            lambda: without_matplotlib(partial(plot_ranks, {"first.weight": 2}))
        ),
        "RankCurve.plot draws with matplotlib: pip install 'lightning-lora[plots]'": (
            lambda: without_matplotlib(RankCurve({}, {}, {}).plot)
        ),
    },
    ("layout", ValueError): {
        "layout: groups=0 is no field of a layout, or out of its range": lambda: Layout.from_description({"groups": 0}),
    },
    ("sites", ValueError): {
        "task='german': the model has no adapter of that name; it has ['default']": lambda: use(adapted(), "german"),
        "first.weight is not adapted, or not any more: sites(model) returns those that are": lambda: removed().slot,
    },
    ("sites", RuntimeError): {
        "training while the adapters are merged would not reach them: leave `merged(model)` first, or call "
        "model.eval() if this is inference": lambda: while_merged(lambda model: model(torch.ones(1, 4))),
        "inside per_example(model, ...) the adapters in use differ by example, so there are none for the whole model: "
        "leave the block, then choose with use(model, 'default')": lambda: in_mixed_batches(merge_),
        "cannot use the bare base now: training writes what default adds to the base to first.weight itself: wait for "
        "the end of the run, or train with in_place=False": lambda: use(in_place(net())),
    },
    ("evaluation", ValueError): {
        "loss=None means the training_step of a LightningModule, and Net has none: pass loss=lambda batch: ..., a "
        "function of a batch": lambda: input_statistics(net(), [], []),
    },
    ("rank_curve", ValueError): {
        "ranks=[0, 5]: must be between 0 and 2, the highest rank of the adapters": (
            lambda: rank_curve(adapted(), [], ranks=[5, 0])
        ),
        "batches is empty: pass at least one, for example a validation loader": (
            lambda: rank_curve(adapted(), [], loss=torch.mean)
        ),
    },
    ("recommendation", ValueError): {
        "r=0: must be a whole number of at least 1, for example r=4": lambda: recommend_targets(net(), [], r=0),
        "budget=0: must be a number of parameters, or None for the table alone": (
            lambda: recommend_targets(net(), [], budget=0)
        ),
        "by='size': must be 'captured', or 'importance' where adapters were trained": (
            lambda: recommend_targets(net(), [], by="size")  # type: ignore[arg-type]
        ),
        "by='importance' compares what trained adapters do, and the model has none of task 'default': inject them and "
        "train for a while, or write by='captured'": lambda: recommend_targets(net(), [], by="importance"),
        "batches is empty: pass at least one, for example a training loader": (
            lambda: recommend_targets(net(), [], loss=torch.mean)
        ),
        "none of 2 matrices (first: first.weight) got a gradient: either the loss is detached, or the batches reach "
        "none of them, or all are packed or computed from others": (
            lambda: recommend_targets(net(), [torch.ones(3)], loss=torch.mean)
        ),
    },
    ("gradient_means", ValueError): {
        "the loss of a batch is 1.0, but a tensor of one number is needed: return what training_step does": (
            lambda: recommend_targets(net(), [1.0], loss=float)
        ),
    },
    ("gradient_means", RuntimeError): {
        "a weight of shape [8, 4] got its gradient in several parts in one batch, as reentrant checkpointing gives it "
        "to a layer that is used twice: pass use_reentrant=False": gradient_in_parts,
    },
    ("input_statistics", ValueError): {
        "first.weight got no input: the batches did not call its layer, or its inputs cannot be seen (embeddings, "
        "attention's out_proj, recurrent layers, experts): leave it out": (
            lambda: InputStatistics("first.weight", (8, 4)).top(2)
        ),
        "k=5: of the inputs of first.weight (width 4) 1 to 4 directions are known after 2 rows: give more batches, or "
        "keep more with a higher rank=...": lambda: seen_inputs().top(5),
    },
    ("candidates", ValueError): {
        "first.weight and third.weight are one tied parameter that the two layers use in different shapes: adapt "
        "one of them, for example with exclude_modules=['third.weight']": (
            lambda: adapted(tied(nn.Conv1d(4, 4, 1), nn.ConvTranspose1d(4, 4, 1)), target_modules=["first", "third"])
        ),
    },
    ("targets", ValueError): {
        "target_modules=[] adapts nothing: write target_modules='all-linear' or a list of names": (
            lambda: adapted(target_modules=[])
        ),
        "target_modules is a regular expression of 12000 characters, at most 10000: give a list of names": (
            lambda: adapted(target_modules="fir(st)?" * 1500)
        ),
        "target_modules entry 'frist' matches nothing. Did you mean 'first'?": (
            lambda: adapted(target_modules=["frist"])
        ),
        "'all-linear' stands alone, not in a list: write target_modules='all-linear'": (
            lambda: adapted(target_modules=["all-linear"])
        ),
        "target_modules entry '0' matches 0, a Net: for all layers inside it write '0.*'": (
            lambda: adapted(nn.Sequential(net()), target_modules=["0"])
        ),
        "target_modules entry 'norm' matches norm, a LayerNorm, which has no matrix to adapt: layers that can be "
        "adapted are Linear, ..., GRUCell, transformers' Conv1D, and any matrix named in full; to train it in "
        "full list it in modules_to_save": lambda: adapted(net(norm=nn.LayerNorm(3)), target_modules=["norm"]),
        "target_modules entry 'norm.weight' matches norm.weight, which cannot be adapted (its shape is [3]; a "
        "matrix or a stack of them can, where its own module's forward reads it): to train it in full list it in "
        "modules_to_save": lambda: adapted(net(norm=nn.LayerNorm(3)), target_modules=["norm.weight"]),
        "target_modules entry 'third' matches third, a dynamically quantized Linear of torch.ao, through which no "
        "gradient passes: adapt layers that come after it instead": (
            lambda: adapted(net(third=packed()), target_modules=["third"])
        ),
        "target_modules entry '0.0' matches 0.0, which cannot be adapted (its ParameterList has no forward; a "
        "matrix or a stack of them can, where its own module's forward reads it): to train it in full list it in "
        "modules_to_save": (
            lambda: adapted(nn.Sequential(nn.ParameterList([torch.ones(2, 2)]), net()), target_modules=["0.0"])
        ),
        "target_modules='(first' is not a regular expression: missing ), unterminated subpattern at position 0": (
            lambda: adapted(target_modules="(first")
        ),
        "target_modules='frist' is a regular expression for whole names and matches none; a name goes in a list: "
        "target_modules=['frist']. Did you mean 'first'?": lambda: adapted(target_modules="frist"),
        "target_modules='third.*' is a regular expression for whole names and matches none. Names that exist: "
        "first, second": lambda: adapted(target_modules="third.*"),
        "nothing is left to adapt: target_modules=['first'] chose 1 matrices, and exclude_modules=['first'] and "
        "modules_to_save=[] took out all": lambda: adapted(target_modules=["first"], exclude_modules=["first"]),
        "exclude_modules entry 'thrid' matches nothing. Names that exist: first, second": (
            lambda: adapted(exclude_modules=["thrid"])
        ),
        "modules_to_save entry 'head' matches nothing. Names that exist: first, second": (
            lambda: adapted(modules_to_save=["head"])
        ),
        "rank_pattern entry 'second' fits none of the adapted modules. Names that exist: first": (
            lambda: adapted(target_modules=["first"], rank_pattern={"second": 4})
        ),
        "target_modules='all-linear' found no linear layer in Sequential: layers that can be adapted are Linear, "
        "..., GRUCell, transformers' Conv1D, and any matrix named in full": lambda: adapted(nn.Sequential(nn.ReLU())),
        "target_modules='all-linear' found no linear layer in Sequential: layers that can be adapted are Linear, "
        "..., GRUCell, transformers' Conv1D, and any matrix named in full; write target_modules=['0']": (
            lambda: adapted(nn.Sequential(nn.Conv1d(2, 2, 1)))
        ),
        "target_modules='all-linear' cannot adapt third, a NoisyLinear: layers that can be adapted are Linear, "
        "..., GRUCell, transformers' Conv1D, and any matrix named in full. Leave out what is to stay frozen with "
        "exclude_modules=['third'], or name what is to be adapted with target_modules=[...]": (
            lambda: adapted(net(third=NoisyLinear(), fourth=nn.Identity()))
        ),
        "target_modules='all-linear' cannot adapt third, a NoisyLinear, and 1 more: layers that can be adapted "
        "are Linear, ..., GRUCell, transformers' Conv1D, and any matrix named in full. Leave out what is to stay "
        "frozen with exclude_modules=['fourth', 'third'], or name what is to be adapted with target_modules=[...]": (
            lambda: adapted(net(third=NoisyLinear(), fourth=NoisyLinear()))
        ),
        "target_modules='all-linear' leaves out the output head, and 0 is all there is: target_modules=['0']": (
            lambda: adapted(Pretrained(nn.Linear(4, 8)))
        ),
        "fused entry 'qkv' matches nothing. Names that exist: first, second": (
            lambda: adapted(fused={"qkv": ["q", "k", "v"]})
        ),
        "fused entry 'second' fits second.weight, which is no linear layer's matrix as a whole: name one that is": (
            lambda: adapted(net(second=nn.Conv1d(8, 3, 1)), fused={"second": ["q", "k", "v"]})
        ),
        "fused['first']={'q': 2, 'k': 2, 'v': 2} has 6 rows, but first.weight has 8: give the rows of each part, "
        "such as {'q': 64, 'k': 16, 'v': 16}": lambda: adapted(fused={"first": ["q", "k", "v"]}),
        "fused['first']: 'q/k' is no name for a part: use letters, digits and '_'": (
            lambda: adapted(fused={"first": ["q/k", "v"]})
        ),
    },
    ("frozen_dtype", ValueError): {
        "frozen_dtype=torch.float64: must be the dtype that autocast computes in, torch.bfloat16 or torch.float16": (
            lambda: adapted(frozen_dtype=torch.float64)
        ),
    },
    ("inject", ValueError): {
        "bias='some': must be 'none', 'lora_only' or 'all'": lambda: adapted(bias="some"),
        "task='other': the model has no adapter of that name; it has ['default']": lambda: remove(adapted(), "other"),
    },
    ("injection_checks", ValueError): {
        "task='mein Deutsch': use 1 to 64 letters, digits, '_' or '-', and no attribute of a module, such as "
        "task='german'": lambda: adapted(task="mein Deutsch"),
        "third.weight has no shape yet (lazy layer), so it can be neither adapted nor frozen: run one batch "
        "through the model where it is built, in __init__, setup or configure_model, or give in_features": (
            lambda: adapted(net(third=nn.LazyLinear(3)))
        ),
        "first.weight already has the adapter 'default' with LoRA(r=2, alpha=4, ...), "
        "not LoRA(r=4, alpha=4, ...): call remove(model, 'default') first, or give "
        "another task name": lambda: inject(adapted(), LoRA(r=4, alpha=4)),
        "the adapter 'default' is already there with LoRA(r=2, alpha=4, ...), not "
        "LoRA(r=2, alpha=4, dropout=0.5, ...), and a task has one method: call remove(model, "
        "'default') first, or give another task name": (
            lambda: inject(adapted(target_modules=["first"]), LoRA(r=2, alpha=4, dropout=0.5), ["second"])
        ),
        "first.weight is no parameter but computed from others (by a hook, as old weight norm and pruning do), so "
        "an adapter could not be merged into it: leave it out with exclude_modules=['first'], train it in full "
        "with modules_to_save=['first'], or remove what computes it from the module first": (
            lambda: adapted(net(first=prune.identity(nn.Linear(4, 8), "weight")))
        ),
        "first.weight: its module already has an attribute called 'adapters', the name we need: rename that, or "
        "leave the layer out with exclude_modules=['first']": lambda: adapted(net(first=with_attribute("adapters", 1))),
        "1 of the chosen weights were sharded before their adapters came (first: first.weight, a DTensor), so "
        "every process would train adapters of its own: call inject(...) before fully_shard(...); with a Trainer "
        "use strategy='lora_fsdp2'": lambda: adapted(sharded()),
        "1 of the chosen weights are divided by tensor parallelism (first: first.weight): what their layers give is "
        "divided too, and adapters are whole: leave out parallelize_module and let fully_shard alone divide the "
        "model": (lambda: inject(sharded(), LoRA(r=2), sharded=True)),
        "first.weight: of layers with packed weights only linear ones can be adapted, not a Conv1d: leave it out "
        "with exclude_modules=['first'], or do not quantize it": (
            lambda: adapted(net(first=packed_convolution()), target_modules=["first"])
        ),
        "first.weight: the forward of its Linear was replaced on this one object, so its adapter would never run: "
        "replace it after the injection, or in a subclass, or leave the layer out with exclude_modules=['first']": (
            lambda: adapted(net(first=with_attribute("forward", abs)))
        ),
    },
    ("merge", ValueError): {
        "nothing to merge: Net has no adapters: call inject or load_adapter first": lambda: merge_(net()),
        "cannot merge into first.weight: it is tied to third.weight, which would change with it: untie them "
        "first, or adapt both, which then share one adapter; merged(model) works as it is": (
            lambda: merge_(adapted(tied(nn.Linear(4, 8), nn.Linear(4, 8)), target_modules=["first"]))
        ),
        "cannot merge into first.weight: it is computed by _SpectralNorm, which cannot give the merged weight: "
        "call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') before the adapters are "
        "injected, or keep the adapter unmerged": (
            lambda: merge_(adapted(net(first=parametrizations.spectral_norm(nn.Linear(4, 8)))))
        ),
        "cannot merge into first.weight: it is stored as torch.int8; load the base in full precision": (
            lambda: merge_(adapted(net(first=with_attribute("weight", nn.Parameter(torch.ones(8, 4).char(), False)))))
        ),
    },
    ("merge", UserWarning): {
        "1 quantized weights were rounded again with the adapters in them. The worst, first.weight, is 1.00% off "
        "its adapted value, which the adapters had changed by 5.00%: to merge without this loss call "
        "dequantize_(model, dtype) first": lambda: _warn_of([_Loss(0.01, 0.05, "first.weight")]),
    },
    ("quantized", ValueError): {
        "torchao's Int4Tensor in this configuration cannot be packed again (int8 weight-only can): call "
        "dequantize_(model, dtype) first, or keep the adapter unmerged": lambda: check_requantizable(in_int4().weight),
    },
    ("quantized", UserWarning): {
        "1 quantized layers (first: first) give no gradient to their input, so what lies below them is not "
        "trained through them: quantize weights alone, as torchao's Int8WeightOnlyConfig does": (
            lambda: keep_differentiable(net(first=in_int4()))
        ),
    },
    ("merge", RuntimeError): {
        "cannot merge into first.weight: each process holds a part of it: save the adapters and merge in one process, "
        "with `lightning-lora merge` or load_from_checkpoint(..., merge=True)": lambda: merge_(sharded(adapted())),
        "cannot merge again while the adapters are merged: leave `merged(model)` first": lambda: while_merged(merge_),
        "cannot save while the adapters are merged: leave `merged(model)` first": (
            lambda: while_merged(lambda model: save_adapter(model, "best.adapter"))
        ),
        "cannot save a checkpoint while the adapters are merged: leave `merged(model)` first": (
            lambda: while_merged(lambda module: module.trainer.save_checkpoint("best.ckpt"), fit().lightning_module)
        ),
        "cannot train while the adapters are merged: leave `merged(model)` first": (
            lambda: while_merged(fit, fit().lightning_module)
        ),
    },
    ("switch", RuntimeError): {
        "cannot use the bare base inside per_example(model, ...), where each example has a task of its own: leave the "
        "block first": lambda: in_mixed_batches(use),
    },
    ("mixed_batches", ValueError): {
        "tasks='default': must be a list with a task, or None, for each example of the batch": (
            lambda: in_mixed_batches(tasks="default")
        ),
        "first.weight: an output of size [3, 8] cannot be divided among 2 examples along dimension 0: give one task "
        "for each example of the batch, or run the examples of each task by themselves, in using(model, task)": (
            lambda: in_mixed_batches(lambda model: model(torch.ones(3, 4)))
        ),
        "dim=2: must be 0, or 1 where the sequence comes first": lambda: in_mixed_batches(dim=2),
        "attention has batch_first=False, so adapted layers may see the sequence first: write per_example(model, "
        "tasks, dim=1), or dim=0 if they see the examples first": (
            lambda: in_mixed_batches(model=adapted(net(attention=nn.MultiheadAttention(4, 2))))
        ),
        "the model has batch_first=False, so adapted layers may see the sequence first: write per_example(model, "
        "tasks, dim=1), or dim=0 if they see the examples first": (
            lambda: in_mixed_batches(model=adapted(nn.MultiheadAttention(4, 2)))
        ),
        "in_proj_weight: the forward of the model reads this weight once for a whole batch: run the examples of each "
        "task by themselves, in using(model, task)": (
            lambda: in_mixed_batches(model=adapted(nn.MultiheadAttention(4, 2, batch_first=True)))
        ),
        "attention.out_proj.weight: the forward of attention reads this weight once for a whole batch: run the "
        "examples of each task by themselves, in using(model, task)": (
            lambda: in_mixed_batches(
                model=adapted(net(attention=nn.MultiheadAttention(4, 2, batch_first=True)), target_modules=["out_proj"])
            )
        ),
    },
    ("mixed_batches", RuntimeError): {
        "first.weight is merged, for all examples alike: leave `merged(model)` first": (
            lambda: while_merged(lambda model: in_mixed_batches(model=model))
        ),
        "per_example(model, ...) inside another such block: leave that one first": (
            lambda: in_mixed_batches(lambda model: in_mixed_batches(model=model))
        ),
    },
    ("saving", ValueError): {
        "task='german': the model has no adapter of that name to save; it has ['default']": (
            lambda: save_adapter(adapted(), "best.adapter", task="german")
        ),
    },
    ("saving", AdapterError): {
        "best.adapter: not written, because 1 trained parameters are not finite: first.adapters.weight.default.lora_A. "
        "The run diverged: go on from the last save, with a lower learning rate or gradient_clip_val": (
            lambda: save_adapter(diverged(adapted()), "best.adapter")
        ),
    },
    ("saving", FileExistsError): {
        "runs holds other files, such as notes.txt: give the adapter its own folder": (
            lambda: save_adapter(adapted(), written("runs/notes.txt").parent)
        ),
    },
    ("derived_groups", ValueError): {
        "the saved state of SGD holds first.adapters.weight.default.lora_A in a group where this run's "
        "configure_optimizers has second.adapters.weight.default.lora_A: build the groups that the checkpoint was "
        "written with": lambda: load_state_of_other_groups(),
        "lr_ratio=16: LoRA-FA freezes A, so lr_B/lr_A has no denominator: raise lr instead": (
            lambda: LoRACallback(LoRAFA(), lr_ratio=16)
        ),
        "lr_ratio=16: LoRA-Pro fits the gradients of A and B to one another, for one learning rate: use lr_ratio=1": (
            lambda: LoRACallback(LoRA(gradient="lora_pro"), lr_ratio=16)
        ),
        "lr_ratio=0: must be a finite number above 0; 1 is plain LoRA, LoRA+ suggests 16": (
            lambda: LoRACallback(lr_ratio=0)
        ),
        "LBFGS keeps all parameters in one group: use lr_ratio=1 and no weight_decay by role with it "
        "(lr_ratio=16, weight_decay={})": lambda: split(adapted(), torch.optim.LBFGS(net().parameters()), lr_ratio=16),
        "Outer has no step hooks: use lr_ratio=1 and no weight_decay by role with it (lr_ratio=16, "
        "weight_decay={})": lambda: split(adapted(), Outer(), lr_ratio=16),
        "the saved state of SGD has groups of [1, 3] parameters, but this run's configure_optimizers made groups "
        "of [2, 2]: build the groups that the checkpoint was written with": (
            lambda: split_optimizer(2, 2).load_state_dict(split_optimizer(1, 3).state_dict())
        ),
    },
    ("optim", ValueError): {
        "AdaLoRA counts the steps of the optimizer that trains its adapters, and 2 optimizers do: give all of them to "
        "one in configure_optimizers, or adapt by target_modules what one of them trains": (
            lambda: the_optimizer(
                model := adapted(),
                [torch.optim.SGD(layer.parameters()) for layer in (model.first, model.second)],
                "AdaLoRA",
            )
        ),
        "no parameter requires a gradient: call inject(model, ...) before param_groups(model, ...)": (
            lambda: param_groups(net().requires_grad_(False), lr=0.1)
        ),
        "first.adapters.weight.default.lora_A belongs in two groups of one optimizer: configure_optimizers must "
        "give it to one": lambda: (model := adapted(), place(model, [repeated(model)])),
        "net.first.adapters.weight.default.lora_A is in no optimizer and there are 2 parameter groups to choose "
        "from: add `[p for p in self.parameters() if p.requires_grad]` to one in configure_optimizers": (
            lambda: fit(Lit(lambda module: groups(module.net.first.bias, module.net.second.bias)))
        ),
        "net.first.adapters.weight.default.lora_A is in SparseAdam, which takes sparse gradients only, but those "
        "of adapters are dense: give it to another optimizer in configure_optimizers, such as torch.optim.Adam": (
            lambda: fit(Lit(lambda module: torch.optim.SparseAdam([*module.parameters()])))
        ),
        "Stateful holds state for the parameters that it was built with, so first.adapters.weight.default.lora_A "
        "cannot join it: build it in configure_optimizers, from self.parameters()": (
            lambda: (model := net(), optimizer := Stateful(model), place(adapted(model), [optimizer]))
        ),
    },
    ("files", ValueError): {
        "its header says {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 4]} of A, which leaves a gap or does not "
        "fit": lambda: _places({"A": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}),
        "it was cut short while it was read": lambda: _read(io.BytesIO(b"ab"), torch.float32, [1]),
    },
    ("files", AdapterError): {
        "best.adapter/adapter_model.safetensors: no such file; an adapter folder holds adapter_model.safetensors": (
            lambda: read_tensors("best.adapter/adapter_model.safetensors")
        ),
        "best.adapter/adapter_model.safetensors: not an adapter: its header claims 18446744073709551615 bytes, at "
        "most 16777216": (
            lambda: load_adapter(net(), written("best.adapter/adapter_model.safetensors", b"\xff" * 16).parent)
        ),
        "best.adapter/adapter_model.safetensors: damaged or not a safetensors file: Expecting value: line 1 column 1 "
        "(char 0)": (
            lambda: load_adapter(net(), written("best.adapter/adapter_model.safetensors", b"\x00" * 16).parent)
        ),
        "best.adapter/adapter_model.safetensors: damaged or not a safetensors file: it has 47 bytes where its header "
        "accounts for 55": (
            lambda: load_adapter(net(), written("best.adapter/adapter_model.safetensors", HEADER % 8).parent)
        ),
        "best.adapter/adapter_config.json: not readable as JSON: 'r' is in it twice": (
            lambda: parse_json('{"r": 2, "r": 3}', "best.adapter/adapter_config.json")
        ),
        "best.adapter/adapter_model.safetensors: base_model.model.first.lora_A.weight holds values that are not "
        "finite; the run that wrote it had diverged: take an earlier save": (
            lambda: load_adapter(net(), changed({f"{FIRST}lora_A.weight": torch.full((2, 4), torch.nan)}))
        ),
        "best.adapter/adapter_model.safetensors: written by a newer lightning_lora (schema 2, this version reads "
        "up to 1): upgrade": lambda: load_adapter(net(), changed(schema=2)),
        "best.adapter/adapter_model.safetensors: the checksum does not fit: the file was changed or damaged after "
        "it was written: copy or save it again": lambda: load_adapter(net(), damaged()),
        "best.adapter/adapter_config.json: not readable as JSON: NaN is not a number": (
            lambda: parse_json('{"r": NaN}', "best.adapter/adapter_config.json")
        ),
        "best.adapter/adapter_config.json: holds a list where an object is expected": (
            lambda: parse_json("[]", "best.adapter/adapter_config.json")
        ),
        "best.adapter/adapter_config.json: not an adapter's: it is longer than 16777216 bytes": (
            lambda: read_json(written("best.adapter/adapter_config.json", b" " * (2**24 + 1)))
        ),
        "best.adapter: cannot be read: Too many levels of symbolic links": (
            lambda: (Path("best.adapter").symlink_to("best.adapter"), read_json(Path("best.adapter")))
        ),
    },
    ("whole_files", NotADirectoryError): {
        "best.ckpt is a file: give the name of a folder": lambda: save_adapter(adapted(), written("best.ckpt")),
    },
    ("whole_files", ValueError): {
        "'../notes' is no name inside the folder best.adapter: names are relative and without '..'": (
            lambda: write_folder("best.adapter", {"../notes": b""})
        ),
    },
    ("whole_files", OSError): {
        "[Errno 28] best.ckpt was not written, and what was there before is as it was: No space left on device "
        "(... MiB are free in .): make room there": (
            lambda: write_file("best.ckpt", lambda file: fail(OSError(28, "No space left on device")))
        ),
    },
    ("description", AdapterError): {
        "best.adapter: field 'task' of its description is a NoneType where a str is expected": (
            lambda: load_adapter(net(), changed(task=None))
        ),
        "best.adapter: its description names no adapted matrix, so there is nothing to load": (
            lambda: load_adapter(net(), changed(sites={}))
        ),
        "best.adapter: its description says {'alpha': 4, 'base': 7, 'form': 'linear', 'r': 2, 'size': [8, 4]} of "
        "first.weight, which no save writes: save it again": lambda: load_adapter(net(), changed(site={"base": 7})),
        "best.adapter: field 'weights' of its description is 7, where an object of digests is expected": (
            lambda: load_adapter(net(), changed(weights=7))
        ),
        "best.adapter: field 'save' of its description is 7, where an object with the names of files is expected": (
            lambda: load_adapter(net(), changed(save=7))
        ),
        "best.adapter: task='../up': use 1 to 64 letters, digits, '_' or '-', and no attribute of a module, such as "
        "task='german'": lambda: load_adapter(net(), changed(task="../up")),
        "best.adapter: layout: groups=0 is no field of a layout, or out of its range": (
            lambda: load_adapter(net(), changed(site={"layout": {"groups": 0}}))
        ),
        "best.adapter: field 'trained_in_full' of its description is [7], where a list of names is expected": (
            lambda: load_adapter(net(), changed(trained_in_full=[7]))
        ),
        "best.adapter: field 'not_for_peft' of its description is 7, where a sentence is expected": (
            lambda: load_adapter(net(), changed(not_for_peft=7))
        ),
        "best.adapter: field 'shared' of its description is 7, where an object is expected": (
            lambda: load_adapter(net(), changed(shared=7))
        ),
        "best.adapter: the adapters of LoRA share nothing that is drawn again": (
            lambda: load_adapter(net(), changed(shared={"out_features": 8}))
        ),
        "best.adapter: method 'BoRA' is unknown here; known: ...: import the module that defines it, or upgrade "
        "lightning_lora": lambda: load_adapter(net(), changed(method="BoRA")),
        "best.adapter: hyperparameters of LoRA: r=0: the rank must be a whole number of at least 1, for example "
        "r=8": lambda: load_adapter(net(), changed(site={"r": 0})),
    },
    ("peft_reading", AdapterError): {
        "best.adapter: its config has no lora_alpha, so the scale is not known: add what was trained with": (
            lambda: load_adapter(net(), without_alpha(by_peft()))
        ),
        "best.adapter: first: r=4 in the config, 2 in the tensors: the files are of different saves": (
            lambda: load_adapter(net(), by_peft(r=4))
        ),
        "best.adapter: peft_type='IA3' is not supported; known: ...": (
            lambda: load_adapter(net(), by_peft(peft_type="IA3"))
        ),
        "best.adapter: dropout=2: must be at least 0 and below 1, for example dropout=0.05": (
            lambda: load_adapter(net(), by_peft(lora_dropout=2))
        ),
        "best.adapter: first: alpha_pattern is a int where an object is expected": (
            lambda: load_adapter(net(), by_peft(alpha_pattern=7))
        ),
        "best.adapter: first: target_parameters=[7] is no list of names": (
            lambda: load_adapter(net(), by_peft(target_parameters=[7]))
        ),
        "best.adapter: first: which 1 of its parameters are adapted cannot be told from "
        "target_parameters=['first.weight', 'first.bias']": (
            lambda: load_adapter(net(), by_peft(target_parameters=["first.weight", "first.bias"]))
        ),
        "best.adapter: first: a PEFT before 0.20.0 stored stacks of matrices in another way, and peft_version=None: "
        "merge it with the PEFT that wrote it": (
            lambda: load_adapter(net(), by_peft(target_parameters=["first.weight", "second.weight"], r=1))
        ),
        "best.adapter: first: alpha_pattern key 'fi.*' is a regular expression, and none from a file is run: "
        "write module names there": lambda: load_adapter(net(), by_peft(alpha_pattern={"fi.*": 7})),
        "best.adapter: rank_pattern keeps 1 triplets of first.lora_E, and base_model.model.first.lora_A has no tensor: "
        "copy or save the folder again": lambda: load_adapter(
            net(), by_peft(peft_type="ADALORA", rank_pattern={"first.lora_E": [True, False]})
        ),
        "best.adapter: rank_pattern keeps 1 triplets of first.lora_E, and base_model.model.first.lora_A has [2, 4]: "
        "copy or save the folder again": lambda: load_adapter(
            net(),
            by_peft(
                {"base_model.model.first.lora_A": torch.ones(2, 4)},
                peft_type="ADALORA",
                rank_pattern={"first.lora_E": [True, False]},
            ),
        ),
        "best.adapter: no tensor is called base_model.model.<module>.lora_A.weight: nothing here is an adapter": (
            lambda: load_adapter(net(), by_peft({"base_model.model.first.weight": torch.ones(1)}))
        ),
    },
    ("reading", AdapterError): {
        "...: cannot be read: File name too long": lambda: load_adapter(net(), "a" * 300),
        "best.adapter: its files are of different saves: copy or save the folder again": (
            lambda: load_adapter(*of_two_saves())
        ),
        "best.adapter: teacher/adapter_model.safetensors is missing: copy or save the folder again": (
            lambda: load_adapter(*without_file("teacher/adapter_model.safetensors"))
        ),
        "best.ckpt is a file: give the adapter folder that holds adapter_model.safetensors": (
            lambda: load_adapter(net(), written("best.ckpt"))
        ),
        "runs: no adapter_model.safetensors in this folder": lambda: load_adapter(net(), "runs"),
        "runs: no adapter_model.safetensors in this folder; adapter_model.bin is a pickle, which could run code: "
        "convert it to safetensors first": lambda: load_adapter(net(), written("runs/adapter_model.bin").parent),
        "best.adapter: no adapter_config.json beside adapter_model.safetensors: copy it there, it says r and alpha": (
            lambda: load_adapter(net(), without_config())
        ),
        "best.adapter: base_model.model.first.base_layer.bias is missing: copy or save the folder again": (
            lambda: load_adapter(net(), changed({f"{FIRST}base_layer.bias": None}))
        ),
        "best.adapter: base_model.model.first.lora_embedding_A has shape [2], which fits no r=2": (
            lambda: [
                *inspect(changed({f"{FIRST}lora_embedding_A": torch.ones(2)}, model=net(first=nn.Embedding(4, 8))))
            ]
        ),
    },
    ("full_fingerprint", ValueError): {
        "fingerprint='all': must be 'sampled' or 'full'": (
            lambda: save_adapter(adapted(), "best.adapter", fingerprint="all")  # type: ignore[arg-type]
        ),
    },
    ("full_fingerprint", AdapterError): {
        "best.adapter: trained on another base: 1 of all its 2 weights differ (second.bias). Load the base that it was "
        "trained on, in that precision, or pass allow_base_mismatch=True": (
            lambda: load_adapter(
                net(), changed(weights={"first.bias": full_digest(net().first.bias), "second.bias": "0"})
            )
        ),
    },
    ("loading", AdapterError): {
        "best.adapter: trained on another base: 1 of 2 adapted weights differ (first.weight). Load the base that "
        "it was trained on, or pass allow_base_mismatch=True": (
            lambda: load_adapter(net(first=nn.Linear(4, 8)), saved())
        ),
        "best.adapter: the adapters belong to first.weight, second.weight, which the model does not have or which "
        "cannot be adapted: they were trained on another architecture": lambda: load_adapter(nn.Linear(4, 8), saved()),
        "best.adapter: the adapters fit student and teacher alike: load them into that one, for example "
        "load_adapter(model.student, path)": (
            lambda: load_adapter(nn.ModuleDict({"student": net(), "teacher": net()}), saved())
        ),
        "best.adapter: first.weight was trained as Layout(groups=1, transposed=False, stacked=False, "
        "looked_up=False, kernel=1, rows=None), but the model's is Layout(groups=1, transposed=True, stacked=False, "
        "looked_up=False, kernel=1, rows=None): another kind of layer": (
            lambda: load_adapter(net(first=nn.ConvTranspose1d(8, 4, 1)), saved())
        ),
        "best.adapter: first.weight would be empty in this model, whose matrix has 8 rows: it was trained on "
        "another architecture": lambda: load_adapter(net(), changed(site={"layout": {"rows": [8, 16]}})),
        "best.adapter: first.weight shares its adapter with third.weight, which the model does not have: it was "
        "trained on another architecture": lambda: load_adapter(net(), saved(tied(nn.Linear(4, 8), nn.Linear(4, 8)))),
        "best.adapter: first.weight was tied to third.weight, and in this model it is not: tie them again first": (
            lambda: load_adapter(net(third=nn.Linear(4, 8)), saved(tied(nn.Linear(4, 8), nn.Linear(4, 8))))
        ),
        "best.adapter: first.weight, second.weight is on the meta device: give the base its values, then load": (
            lambda: load_adapter(net().to("meta"), saved())
        ),
        "best.adapter: trained_in_full.safetensors is missing: copy it too, or load into the network alone": (
            lambda: load_adapter(*without_file("trained_in_full.safetensors"))
        ),
        "best.adapter: it holds first.bias, which the model does not have": (
            lambda: load_adapter(net(first=nn.Linear(4, 8, bias=False)), changed(), allow_base_mismatch=True)
        ),
        "best.adapter: first.bias has shape [3], the model's is [8]": (
            lambda: load_adapter(net(), changed({f"{FIRST}base_layer.bias": torch.ones(3)}))
        ),
        "best.adapter: first.bias is stored as torch.int64, the model's is torch.float32": (
            lambda: load_adapter(net(), changed({f"{FIRST}base_layer.bias": torch.ones(8, dtype=torch.long)}))
        ),
        "both: two of its folders adapt first.weight, second.weight: load one of them, such as both/two": (
            lambda: load_adapter(net(), twice())
        ),
        "best.adapter: first.weight already has the adapter 'default' with LoRA(r=4, alpha=16.0, ...), not "
        "LoRA(r=2, alpha=4, ...): call remove(model, 'default') first, or give another task name": (
            lambda: load_adapter((model := net(), inject(model, LoRA(r=4)))[0], saved())
        ),
        "best.ckpt: it adapts net.first.weight, net.second.weight, which Bare does not have: build it as it was "
        "trained": lambda: load_from_checkpoint(Bare, checkpoint()),
        "best.ckpt: it holds head.bias, which Lit does not have: build it as it was trained": (
            lambda: load_from_checkpoint(Lit, changed_checkpoint(trained_in_full=["head.bias"]))
        ),
    },
    ("resuming", AdapterError): {
        "best.ckpt: it adapts other matrices than this run: only in the checkpoint: net.second.weight; only here: "
        "none. Use the target_modules that it was trained with, or say resume_mismatch='reinit'": (
            lambda: resume(checkpoint(), exclude_modules=["second"])
        ),
        "best.ckpt: net.first.weight was trained with LoRA(r=2, alpha=16.0, ...), but "
        "this run has LoRA(r=4, alpha=16.0, ...): give method, rank_pattern and "
        "alpha_pattern as they were, or say resume_mismatch='reinit' or 'resize'": (
            lambda: resume(checkpoint(), rank_pattern={"first": 4})
        ),
        "pipe: no file: give a checkpoint": lambda: (os.mkfifo("pipe"), resume("pipe")),
        "best.ckpt: damaged, or no checkpoint of plain values (EOFError): take another one": (
            lambda: resume(str(written("best.ckpt")))
        ),
        "best.ckpt: the checksum of archive/data.pkl in it does not fit: it was changed or damaged after it was "
        "written: take another one": lambda: resume(flipped(checkpoint(), 100)),
        "best.ckpt was written with a moving average, which cannot be fitted to other adapters: leave out "
        "resume_mismatch and give the configuration that it was written with": (
            lambda: resume(averaged_checkpoint(), rank_pattern={"first": 4}, resume_mismatch="resize")
        ),
        "best.ckpt: the states of its optimizers carry no names, so they cannot be fitted to other parameters: "
        "resume with the configuration that it was written with": (
            lambda: resume(checkpoint_without_names(), rank_pattern={"first": 4}, resume_mismatch="resize")
        ),
    },
    ("fitting", AdapterError): {
        "best.adapter: base_model.model.first.lora_B.weight is missing: copy or save the folder again": (
            lambda: load_adapter(net(), changed({f"{FIRST}lora_B.weight": None}))
        ),
        "best.adapter: base_model.model.first.lora_A.weight has shape [3, 4], but [2, 4] is expected: r=2 on a 8 "
        "x 4 matrix": lambda: load_adapter(net(), changed({f"{FIRST}lora_A.weight": torch.ones(3, 4)})),
        "best.adapter: base_model.model.first.lora_A.weight is stored as torch.int64, not as floating point": (
            lambda: load_adapter(net(), changed({f"{FIRST}lora_A.weight": torch.ones(2, 4, dtype=torch.long)}))
        ),
        "best.adapter: it holds tensors that belong to no adapted module: base_model.model.first.lora_C.weight": (
            lambda: load_adapter(net(), changed({f"{FIRST}lora_C.weight": torch.ones(2)}))
        ),
        "best.adapter: first.weight: r=1000000000000000000000000000000 is beyond all bounds: copy or save the "
        "folder again": lambda: load_adapter(net(), changed(site={"r": 10**30})),
        "best.adapter: first.weight was trained with PEFT as something else than it is here: PEFT stores its "
        "factors in another way on a Conv1d": lambda: load_adapter(net(first=nn.Conv1d(4, 8, 1)), by_peft()),
        "base.pt: best.adapter: its factors do not fit first.weight of the base: give the one it was trained on": (
            lambda: merge(saved(), base(net(first=nn.Linear(5, 8))), Path("merged.pt"))
        ),
        "base.pt: best.adapter: its factors fit first.down, first.up in several ways: load it into the model, "
        "with load_adapter, and merge it there, with merge_": (
            lambda: merge(two_tables(), base(first_up=torch.ones(4, 4), first_down=torch.ones(4, 4)), Path("merged.pt"))
        ),
        "base.pt: best.adapter: first.weight may lie as (out, in) or as (in, out): load it into the model, with "
        "load_adapter, and merge it there, with merge_": lambda: merge_square(),
    },
    ("weight_files", AdapterError): {
        "base.pt: no such file, or a folder without .safetensors files": (
            lambda: merge(saved(), Path("base.pt"), Path("merged.pt"))
        ),
        "base.safetensors: damaged or not a safetensors file: Error while deserializing header: header too small": (
            lambda: merge(saved(), written("base.safetensors"), Path("merged.pt"))
        ),
        "base.pt: not readable as plain weights (EOFError): give what torch.save(model.state_dict(), path) wrote": (
            lambda: merge(saved(), written("base.pt"), Path("merged.pt"))
        ),
        "base.pt: holds no state dict: expected are tensors by name, or these under 'state_dict'": (
            lambda: merge(saved(), stored("base.pt", {"epoch": 3}), Path("merged.pt"))
        ),
    },
    ("weight_files", FileExistsError): {
        "merged.pt exists: give another --out": lambda: merge(saved(), base(), written("merged.pt")),
    },
    ("offline", AdapterError): {
        "base.pt: best.adapter: trained_in_full.safetensors is missing: copy it too, or merge into the network's "
        "weights alone": lambda: (
            parts := without_file("trained_in_full.safetensors"),
            merge(parts[1], base(parts[0]), Path("merged.pt")),
        ),
        "base.pt: first.weight is not what best.adapter was trained on: give that base, or --allow_base_mismatch": (
            lambda: merge(saved(), base(net(first=nn.Linear(4, 8))), Path("merged.pt"))
        ),
        "base.pt: best.adapter: the adapters belong to first.weight, second.weight, which the model does not have "
        "or which cannot be adapted: they were trained on another architecture": (
            lambda: merge(saved(), base(nn.Linear(2, 2)), Path("merged.pt"))
        ),
        "base.pt: first.weight is packed (Tensor of torch.int8), and only its model can unpack it: load both in "
        "Python and call merge_(dequantize_(model, dtype))": (
            lambda: merge(saved(), base(first_weight=torch.ones(8, 4).char()), Path("merged.pt"))
        ),
        "base.pt: it has no first.bias, which best.adapter has trained in full: give the base that it was trained "
        "on": lambda: merge(saved(bias="all"), base(first_bias=None), Path("merged.pt")),
        "base.pt: first.bias has shape [3], but was trained as [8]: give the base that it was trained on": (
            lambda: merge(saved(bias="all"), base(first_bias=torch.ones(3)), Path("merged.pt"))
        ),
        "base.pt: first.weight is tied to third.weight, which would change with it: merge it in the model, with "
        "merge_, after untying them": lambda: merge_tied(),
        "best.adapter: whose factors are whose of first.down or first.up is not in the files, and their ranks or "
        "scales differ: load it into the model, with load_adapter": lambda: [*inspect(two_tables())],
        "best.adapter holds 2 networks: export one of best.adapter/one, best.adapter/two": (
            lambda: export(saved(two_networks()), Path("portable"))
        ),
        "best.adapter: PEFT's files do not hold the size of first.weight: load it into the model, with load_adapter, "
        "and save it from there, with save_adapter": lambda: [*inspect(by_peft(method=VeRA(r=2)))],
        "best.adapter has no portable form: first.weight is not the weight of a linear layer; merge it into the "
        "base instead, or give the folder to PEFT as it is": (
            lambda: export(saved(net(first=nn.Conv1d(4, 8, 1)), target_modules=["first"]), Path("portable"))
        ),
        "best.adapter has no portable form: what DoRA adds depends on the base's weight; merge it into the base "
        "instead, or give the folder to PEFT as it is": (lambda: export(saved(method=DoRA(r=2)), Path("portable"))),
        "best.adapter has no portable form: PEFT adds the change of an nn.MultiheadAttention's out_proj twice (up "
        "to 0.21.2): 0.in_proj_weight; merge it into the base instead": (
            lambda: export(saved(nn.Sequential(nn.MultiheadAttention(4, 2))), Path("portable"))
        ),
        "best.adapter: the factors of first.weight have no shapes of an adapter with r=2: copy or save the folder "
        "again": lambda: [*inspect(changed({f"{FIRST}lora_A.weight": torch.ones(3, 4)}))],
    },
    ("offline", FileExistsError): {
        "portable exists: give a new folder": lambda: export(saved(), written("portable/notes.txt").parent),
    },
    ("checkpoints", AdapterError): {
        "full.ckpt was not written with LoRACallback, so it holds no adapters: load its weights where the module "
        "builds its base, and start without ckpt_path": lambda: resume(full_checkpoint()),
        "full.ckpt was not written with LoRACallback: use Lit.load_from_checkpoint instead": (
            lambda: load_from_checkpoint(Lit, full_checkpoint())
        ),
        "best.ckpt: net.first.bias, net.second.bias is missing, which this run trains: give modules_to_save and "
        "bias as they were": lambda: resume(checkpoint(), bias="all"),
        "best.ckpt: it holds net.first.bias, net.second.bias, which this run does not train: give modules_to_save "
        "and bias as they were": lambda: resume(checkpoint(bias="all")),
        "best.ckpt: not written, because state_dict() of Forgetful leaves out "
        "net.first.adapters.weight.default.lora_A, net.first.adapters.weight.default.lora_B, "
        "net.second.adapters.weight.default.lora_A, net.second.adapters.weight.default.lora_B: do not override "
        "it, the base is kept out of checkpoints without that": lambda: checkpoint(Forgetful()),
        "best.ckpt: it adapts net.first.weight, net.second.weight, which InSetup does not have: build it as it "
        "was trained; if it builds its layers in setup, pass setup_stage='predict'": (
            lambda: load_from_checkpoint(InSetup, checkpoint(InSetup()))
        ),
    },
    ("checkpoints", UserWarning): {
        "[Errno 17] file/best.ckpt was not written, and what was there before is as it was: File exists (... MiB are "
        "free in file): give a folder that can be written to; training goes on, and no checkpoint is removed until "
        "one is written": (lambda: (written("file"), fit(on_save_error="warn").save_checkpoint("file/best.ckpt"))),
        "best.ckpt is of another configuration, so not all of its values are resumed: 2 start fresh "
        "(net.first.adapters.weight.default.lora_A, net.first.adapters.weight.default.lora_B)": (
            lambda: resume(checkpoint(), rank_pattern={"first": 4}, resume_mismatch="reinit")
        ),
        "memory://best.ckpt is not a local file: its adapter folder is not written: call save_adapter(model, "
        "folder) for one": lambda: fit().save_checkpoint("memory://best.ckpt"),
    },
    ("checkpoints", RuntimeError): {
        "...only adapters are in this file, read it with lightning_lora.load_from_checkpoint or with LoRACallback...": (
            lambda: Lit.load_from_checkpoint(checkpoint())
        ),
    },
    ("callbacks/conflicts", ValueError): {
        "this Trainer has LoRACallback and MyCallback: give it one, as an optimizer has one lr_ratio only": (
            lambda: fit(None, type("MyCallback", (LoRACallback,), {})())
        ),
        "BackboneFinetuning freezes and thaws layers, as LoRACallback does, so one would undo what the other did: "
        "take it out of Trainer(callbacks=[...]), and list what is to be trained in full in "
        "LoRACallback(modules_to_save=[...])": lambda: fit(None, BackboneFinetuning()),
        "ModelPruning sets weights of the frozen base to zero, and checkpoints do not hold the base: take it out "
        "of Trainer(callbacks=[...]), and prune before adapters are trained or after merge_(model)": (
            lambda: fit(None, ModelPruning("l1_unstructured"))
        ),
    },
    ("callbacks/averaging", ValueError): {
        "EMAWeightAveraging would average what DeltaLoRA replaces along the run with what it was before, which means "
        "nothing: use AdapterEMA, which averages only what is trained": (
            lambda: trainer(LoRACallback(DeltaLoRA()), EMAWeightAveraging()).fit(Lit(), loader(1))
        ),
        "AdapterEMA would average what ReLoRA replaces along the run with what it was before, which means nothing: "
        "leave it out": lambda: trainer(LoRACallback(ReLoRA()), AdapterEMA()).fit(Lit(), loader(1)),
        "AdapterEMA would average what LoRADrop replaces along the run with what it was before, which means nothing: "
        "leave it out": lambda: fit(None, AdapterEMA(0.9), method=LoRADrop(r=2)),
        "EMAWeightAveraging copies the module before the adapters are in it: put LoRACallback before it in "
        "Trainer(callbacks=[...]); or use AdapterEMA, which averages only what is trained and may stand anywhere "
        "in the list": lambda: trainer(EMAWeightAveraging(), LoRACallback()).fit(Lit(), loader(1)),
        "StochasticWeightAveraging resets the running statistics of all BatchNorm layers, and the frozen ones are "
        "not measured again: use EMAWeightAveraging, or list these layers in modules_to_save": (
            lambda: fit(Normed(), StochasticWeightAveraging(0.1))
        ),
        "EMAWeightAveraging copies the whole module, and LoRAFSDP2Strategy divides its base: use AdapterEMA, which "
        "averages only what is trained": lambda: check_divided(dividing(EMAWeightAveraging()), LoRA()),
        "in_place=True writes to the base, and LoRAFSDP2Strategy divides it: use in_place=False, which computes the "
        "same": lambda: check_divided(dividing(), DeltaLoRA(in_place=True)),
    },
    ("callbacks/audit", RuntimeError): {
        "2 of 6 adapter parameters got no gradient in the first batch: net.idle.weight (default.lora_A), "
        "net.idle.weight (default.lora_B). Either the forward does not call these layers as modules (a teacher, a "
        "layer whose weight is read directly): leave them out with exclude_modules=['net.idle']. Or something "
        "cuts the gradient, as reentrant checkpointing of a frozen input does: pass use_reentrant=False. Or later "
        "batches use them, or the module averages them from others: set LoRACallback(audit=False)": lambda: fit(Idle()),
        "4 of 4 adapter parameters got no gradient in the first batch: first.weight (default.lora_A), "
        "first.weight (default.lora_B), second.weight (default.lora_A), .... Something cuts the gradient, as "
        "reentrant checkpointing of a frozen input does: pass use_reentrant=False. Or later batches use them, or "
        "the module averages them from others: set LoRACallback(audit=False)": lambda: Audit(adapted()).check(),
        "1 weights of the frozen base were changed during the first batch: first.weight. Checkpoints do not hold "
        "them, so the change would be lost. Something writes to parameters itself, such as weight clipping: let "
        "it skip those that do not require a gradient, or train the module in full with modules_to_save=['first']": (
            lambda: clip_weights()
        ),
    },
    ("callbacks/ema", ValueError): {
        "decay=1: must be at least 0 and below 1, for example AdapterEMA(decay=0.999)": lambda: AdapterEMA(decay=1),
        "update_every_n_steps=0: must be at least 1, which is every step": lambda: AdapterEMA(update_every_n_steps=0),
        "update_starting_at_step=-1: must be at least 0, the first step": (
            lambda: AdapterEMA(update_starting_at_step=-1)
        ),
        "EMAWeightAveraging and AdapterEMA would both put averages into the model: leave one of them out": (
            lambda: fit(None, AdapterEMA(), EMAWeightAveraging())
        ),
    },
    ("callbacks/guards", RuntimeError): {
        "the loss depends on no adapter. Either the forward calls none of the adapted layers as a module, or "
        "something cuts the gradient, as reentrant checkpointing of a frozen input does: pass "
        'use_reentrant=False, or for a model of transformers gradient_checkpointing_kwargs={"use_reentrant": '
        "False}": lambda: check_connected(torch.ones(1), adapted()),
        "the loss depends on no adapter. third is a dynamically quantized Linear of torch.ao, through which no "
        "gradient passes: adapters before it cannot learn. Either the forward calls none of the adapted layers as "
        "a module, or something cuts the gradient, as reentrant checkpointing of a frozen input does: pass "
        'use_reentrant=False, or for a model of transformers gradient_checkpointing_kwargs={"use_reentrant": '
        "False}": lambda: check_connected(torch.ones(1), net(third=packed())),
        "4 parameters of the frozen base require a gradient: first.weight, first.bias, second.weight, .... "
        "Something set requires_grad after injection: to train them in full list them in modules_to_save; to "
        "switch the gradients of an adversary by turns call self.toggle_optimizer(...) instead": (
            lambda: check_frozen(adapted().requires_grad_(True))
        ),
        "2 of 2 adapters are gone since they were injected: first.weight, second.weight. Something put other "
        "layers in their place, as precision plugins do: let it convert the module before the Trainer runs": (
            lambda: check_present(net(), sites(adapted()))
        ),
    },
    ("callbacks/guards", ValueError): {
        "frozen_dtype='half': must be 'bfloat16' or 'float16', or left out": lambda: fit(frozen_dtype="half"),
        "frozen_dtype='bfloat16' is for precision='bf16-mixed', whose products are computed in it, and the trainer has "
        "precision='32-true': change one of them, or leave it out": lambda: fit(frozen_dtype="bfloat16"),
        "frozen_dtype='float16' cannot go with LoRAFSDP2Strategy, which divides blocks of one dtype: leave it out and "
        "load the whole base in float16, or take strategy='lora_ddp'": lambda: check_frozen_dtype(
            SimpleNamespace(precision_plugin=SimpleNamespace(precision="16-mixed"), strategy=LoRAFSDP2Strategy()),
            "float16",
        ),
        "in_place=True: net.second.weight is tied to net.tied.weight, which would change with it: adapt both, or use "
        "in_place=False": lambda: fit(Tied(), method=DeltaLoRA(in_place=True), target_modules=["first", "second"]),
        "AdamW with fused=True under precision='16-mixed' sees scaled gradients, and AdaLoRA has to look at true ones: "
        "leave out fused=True, or use precision='bf16-mixed'": lambda: check_scaled(
            SimpleNamespace(precision="16-mixed", precision_plugin=SimpleNamespace(scaler=torch.amp.GradScaler("cpu"))),
            torch.optim.AdamW(net().parameters(), fused=True),
            "AdaLoRA",
        ),
        "first is a DistributedDataParallel before its adapters came, so every process would train adapters of "
        "its own: wrap nothing in configure_model and use strategy='ddp', or 'lora_fsdp' to divide the base": (
            lambda: check_unwrapped(net(first=type("DistributedDataParallel", (nn.Linear,), {})(4, 8)))
        ),
        "fingerprint='full' under LoRAFSDP2Strategy: no process has the whole base when it saves: leave it out, and "
        "write the folder in one process with save_adapter(model, folder, fingerprint='full')": (
            lambda: check_strategy(LoRAFSDP2Strategy(), "full")
        ),
        "strategy=FSDPStrategy: it would gather the whole base for each checkpoint and divide adapters too: use "
        "strategy='lora_fsdp'": lambda: check_strategy(strategy("FSDPStrategy")),
        "strategy=DDPStrategy trains in spawned or forked processes, and adapters that are injected there would stay "
        "there: use strategy='ddp', or in a notebook call inject(model, LoRA(...)) with the same method and targets "
        "before trainer.fit": lambda: check_launcher(strategy("DDPStrategy", "_MultiProcessingLauncher")),
    },
    ("strategies/base_weights", AdapterError): {
        "base_weights=/weights: Linear has no part called 'net'": (
            lambda: fill_base(nn.Linear(2, 2), {"net": "/weights"}, torch.device("cpu"))
        ),
        "base_weights=.: there is no *.safetensors file in it": (
            lambda: fill_base(nn.Linear(2, 2), {"": "."}, torch.device("cpu"))
        ),
        "base_weights=...: its files lack weight: give the folder of this base": lambda: filled_from({"bias": 2}),
        "steps has no values, and base_weights has no file for it: name the part that it is in; a buffer that files do "
        "not hold keeps its values where the base is built under parameters_on_meta()": (
            lambda: filled_from({"bias": 2, "weight": (2, 2)}, steps=torch.zeros(1, device="meta"))
        ),
    },
    ("strategies/blocks", ValueError): {
        "Net has no adapters, and what is trained is not divided by this strategy: add LoRACallback to the Trainer's "
        "callbacks, or use strategy='fsdp' to train everything": lambda: kept_whole(net()),
        "blocks=['Decoder']: no module of the model is of that class; it has ['Sequential']": (
            lambda: blocks_of(nn.Sequential(nn.Linear(2, 2)), ["Decoder"])
        ),
    },
    ("strategies/fsdp", ValueError): {
        "state_dict_type='sharded': adapters are whole on every process and written to one file: leave it out": (
            lambda: LoRAFSDPStrategy(state_dict_type="sharded")
        ),
        "strategy=LoRAFSDPStrategy: net.first.weight, net.first.bias, net.second.weight, net.second.bias is on the "
        "meta device: give the base its values first, or use LoRAFSDP2Strategy(base_weights=...), which reads them "
        "shard by shard": lambda: set_up(LoRAFSDPStrategy(), Lit().to("meta")),
    },
    ("strategies/fsdp2", ValueError): {
        "replicas=3: 2 processes cannot be divided into that many equal parts: give a divisor": (
            lambda: on_two_devices(LoRAFSDP2Strategy(replicas=3)).setup_environment()
        ),
    },
    ("callbacks/silent_batches", ValueError): {
        "Looking has automatic_optimization=False, so its training_step steps the optimizer and cannot run just to "
        "look at a loss: use automatic optimization, or a method and an init that look at no data": (
            lambda: fit(Looking(automatic=False))
        ),
        "training_step of Fetching takes dataloader_iter, so it would fetch batches of the run itself: let it take "
        "(batch, batch_idx), or use a method and an init that look at no data": (
            lambda: list(silent_losses(trainer(), Fetching(), 1))
        ),
        "the training data, a _SingleProcessDataLoaderIter, can be iterated over only once, so batches looked at would "
        "be missing in training: give a DataLoader, or an object whose __iter__ returns a new iterator": (
            lambda: trainer().fit(Looking(), iter(loader(1)))
        ),
    },
    ("callbacks/lora", ValueError): {
        "resume_mismatch='skip': must be 'error', 'reinit' or 'resize'": (
            lambda: LoRACallback(resume_mismatch="skip")  # type: ignore[arg-type]
        ),
        "on_save_error='skip': must be 'raise' or 'warn'": (
            lambda: LoRACallback(on_save_error="skip")  # type: ignore[arg-type]
        ),
        "frozen_dtype='bfloat16' rounds the weights that fingerprint='full' is to tell apart: leave one of them out": (
            lambda: LoRACallback(frozen_dtype="bfloat16", fingerprint="full")
        ),
        "method='lora': give a method, for example LoRACallback(LoRA(r=8))": (
            lambda: LoRACallback("lora")  # type: ignore[arg-type]
        ),
    },
    ("callbacks/optimizers", ValueError): {
        "configure_optimizers returned no optimizer, so the adapters would not be trained: return one over "
        "self.parameters()": lambda: fit(Lit(lambda module: None)),
        "configure_optimizers gave its optimizer no parameter: it filters by requires_grad and what it chose is "
        "frozen now; list that module in LoRACallback(modules_to_save=[...])": (
            lambda: fit(Lit(lambda module: over_trainable(module.net.first)), target_modules=["second"])
        ),
    },
    ("callbacks/lora", RuntimeError): {
        "configure_optimizers of Replaces was replaced in its setup, after LoRACallback had wrapped it, so "
        "adapters or optimizer groups are missing: replace it in __init__": lambda: fit(Replaces()),
    },
    ("callbacks/injection", UserWarning): {
        "InSetup built its layers anew, so what was trained in it is gone and its adapters are fresh: pass "
        "ckpt_path, or let it build only what is not there yet": (
            lambda: (module := InSetup(), fit(module).test(module, loader(1)))
        ),
        "trained in full by modules_to_save or bias: net.second.weight is net.tied.weight too (tied weights), so "
        "both layers change": lambda: fit(Tied(), modules_to_save=["second"], target_modules=["first"]),
        "the adapters' dropout has no effect at 2 matrices (first: net.self_attn.in_proj_weight): the forward of "
        "their layer reads them, or looks rows up, instead of multiplying an input by them": (
            lambda: fit(Attending(), method=LoRA(r=2, dropout=0.1))
        ),
    },
    ("callbacks/preemption", UserWarning): {
        "PreemptionCheckpoint saves nothing at the end of a fit, and beside it Lightning adds no ModelCheckpoint by "
        "itself: give Trainer(callbacks=[..., ModelCheckpoint()])": leave,
        "SIGTERM came: step 1 is saved in ./preempted.ckpt, and the job ends; fit(..., ckpt_path='last') goes on from "
        "there": leaving,
        "scontrol requeue 4217 failed, so submit the job again yourself: [Errno 2] No such file or directory: "
        "'scontrol'": requeue,
    },
    ("callbacks/random_states", UserWarning): {
        "the checkpoint holds no random states, as those of earlier versions and those that an exception in one of "
        "several processes left, so with dropout or shuffling this run differs from the uninterrupted one: "
        "checkpoints that it writes will hold them": lambda: resume(with_random_states(dict.pop)),
        "the checkpoint holds the random states of 2 processes and this run has 1, so with dropout or shuffling it "
        "differs from the uninterrupted one: resume with 2 processes": (
            lambda: resume(with_random_states(lambda content, key: content[key].append(content[key][0])))
        ),
        "the checkpoint was written in the middle of an epoch and DataLoader cannot go back to its place, so it starts "
        "over and this run differs from the uninterrupted one: resume from the end of an epoch, or give a loader with "
        "state_dict and load_state_dict, such as torchdata's StatefulDataLoader": (
            lambda: resume_after_one_batch(loader(2))
        ),
        "the checkpoint was written in the middle of an epoch by a loader without a length, from which Lightning takes "
        "one batch ahead, so a batch is left out and this run differs from the uninterrupted one: resume from the end "
        "of an epoch, or give the loader __len__": lambda: resume_after_one_batch(Placed(WithoutLength(), None)),
        "the checkpoint was written before a validation that was due, which Lightning leaves out, so this run differs "
        "from the uninterrupted one: resume from a step that no validation follows, or from the end of an epoch": (
            lambda: resume_after_one_batch(loader(1), val_dataloaders=loader(1))
        ),
    },
    ("strategies/ddp", ValueError): {
        "strategy=LoRADDPStrategy: no parameter of Net requires a gradient, so there is nothing to train: give "
        "Trainer(callbacks=[LoRACallback(...)]), or call inject(model, LoRA()) first": (
            lambda: LoRADDPStrategy()._setup_model(net().requires_grad_(False))
        ),
        "broadcast_base=False: one rank has 1 frozen tensors and another 4, so their models differ: build the same "
        "model on every rank": lambda: beside({"first.weight": torch.ones(2)}, net().state_dict()),
        "broadcast_base=False: 1 of 4 frozen tensors differ between ranks, the first is second.weight: load the same "
        "weights on every rank, or leave broadcast_base=False out": (
            lambda: beside(net().state_dict() | {"second.weight": torch.ones(3, 8)}, net().state_dict())
        ),
    },
    ("callbacks/optimizers", UserWarning): {
        "2 trained parameters (first: net.first.adapters.weight.default.lora_A) were in no optimizer, because "
        "configure_optimizers chose others: they were added to its only group. Pass self.parameters() to say so. "
        "What it chose is frozen (first: net.second.weight); to train that too, list it in modules_to_save.": (
            lambda: fit(Lit(lambda module: torch.optim.SGD(module.net.second.parameters())), exclude_modules=["second"])
        ),
        "4 trained parameters (first: net.first.adapters.weight.default.lora_A) were in no optimizer, because "
        "configure_optimizers chose others: they were added to its only group. Pass self.parameters() to say so.": (
            lambda: fit(Lit(lambda module: torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)))
        ),
        "2 of the groups that configure_optimizers made hold frozen parameters only (first: net.first.weight), so "
        "they train nothing: list in modules_to_save what is to be trained in full, such as a new head": (
            lambda: fit(Lit(lambda module: groups(*module.net.parameters())), target_modules=["first"])
        ),
    },
}


@pytest.mark.parametrize(
    ("room", "error", "text", "trigger"),
    [
        pytest.param(room, error, text, trigger, id=f"{room}: {text}"[:80])
        for (room, error), rows in MESSAGES.items()
        for text, trigger in rows.items()
    ],
)
def test_a_message_reads_as_it_is_listed_and_comes_from_its_room(
    room: str,
    error: type[Exception],
    text: str,
    trigger: Callable[[], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as raised:
        trigger()
    said = str(raised.value)
    assert raised.type is error
    assert said == text or re.fullmatch(re.escape(text).replace(r"\.\.\.", ".+"), said, re.DOTALL)
    rooms = list(rooms_of(raised.value))
    assert room in rooms or not rooms  # Lightning's own errors may quote us


def test_every_message_in_the_package_is_listed() -> None:
    listed = {room: [text for (other, _), rows in MESSAGES.items() if other == room for text in rows] for room in ROOMS}
    missing = [
        f"{one.place} gives a message that no row of {one.room!r} has: {one.text}"
        for one in sentences()
        if not any(re.fullmatch(f"(.+: )?{one.pattern}", text, re.DOTALL) for text in listed[one.room])
    ]
    assert not missing, "\n".join(missing)


def test_every_room_that_is_listed_gives_messages() -> None:
    assert {room for room, _ in MESSAGES} == {one.room for one in sentences()}


def rooms_of(error: BaseException | None) -> Iterator[str]:
    """The files of the package in which an error, and those that it came from, were raised."""
    while error is not None:
        frames = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        yield from [room for frame in frames for room, path in ROOMS.items() if path == frame][-1:]
        error = error.__context__
