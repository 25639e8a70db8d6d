"""The dataclasses of options refuse the same values as the commands, and take their limits from one place."""

from dataclasses import fields, replace

import pytest
import torch

import sample
from cca.config import SampleRequest, TrainingConfig
from cca.sampling.sampler import Sampler
from cca.training.options import training_parser
from models import SamplingOptions, UserError, load_model
from models.utils.limits import Limits

REQUEST = SampleRequest(10, (0, 9), "balanced", 0, None, "float32", SamplingOptions())
CONFIG = TrainingConfig(
    loss="cca", beta=0.1, lambda_=0.0, uncond_ratio=0.1, batch_size=8, lr=0.0, weight_decay=0.05,
    final_weight_decay=None, ema=0.0, grad_clip=1.0, warmup=0.0, final_lr=1.0, schedule_accumulation=1,
    max_steps=3, seed=0, dtype="float32",
)  # fmt: skip
NAN = float("nan")


@pytest.mark.parametrize(
    "options, name, values",
    [
        (REQUEST, "num_samples", (0, -1, 2.5, None)),
        (REQUEST, "class_order", ("random ", None)),
        (REQUEST, "seed", (-1, 2**63)),
        (REQUEST, "eval_size", (0,)),
        (REQUEST, "dtype", ("float64", torch.float32)),
        (CONFIG, "beta", (0, -0.1, NAN)),
        (CONFIG, "lambda_", (-1, float("inf"))),
        (CONFIG, "uncond_ratio", (-0.1, 1.1)),
        (CONFIG, "batch_size", (0, 1.0)),
        (CONFIG, "lr", (-1e-4, "1e-4")),
        (CONFIG, "final_weight_decay", (-1, NAN)),
        (CONFIG, "grad_clip", (0, None)),
        (CONFIG, "max_steps", (0,)),
        (CONFIG, "ema", (1.5,)),
        (CONFIG, "dtype", ("half",)),
    ],
)
def test_values_outside_limits_are_refused(options, name, values):
    for value in values:
        with pytest.raises(UserError, match=f"^{name}: "):
            replace(options, **{name: value})


@pytest.mark.parametrize("classes", [(10,), (0, -1), ()])
def test_unknown_classes_are_refused(classes):
    model, request = load_model("var-mini"), replace(REQUEST, classes=classes)
    with pytest.raises(UserError, match="^--classes: .*expected"):
        Sampler(model, request, 4, torch.device("cpu"))


def test_commands_and_dataclasses_share_limits():
    """For every field with limits and an option, the parser and the dataclass refuse the same values."""
    training = training_parser("x", "train_var_cca", "--data", "x")
    for parser, options in ((sample.make_parser(), (SamplingOptions(), REQUEST)), (training, (CONFIG,))):
        actions = {action.dest: action for action in parser._actions}
        for instance in options:
            limited = {field.name for field in fields(instance)} & set(instance.limits)
            assert limited == set(instance.limits)
            for name in limited & actions.keys():
                allowed = instance.limits[name]
                if not isinstance(allowed, Limits):
                    assert actions[name].choices == allowed
                    continue
                for text in ("-1", "0", "1e-7", "0.5", "1", "1.5", "2", "nan", "inf"):
                    assert refuses(lambda: actions[name].type(text)) == refuses(  # noqa: B023, called at once
                        lambda: replace(instance, **{name: parse_number(text)})  # noqa: B023
                    ), (name, text)


def parse_number(text):
    return float(text) if not text.lstrip("-").isdecimal() else int(text)


def refuses(call):
    try:
        call()
    except Exception:
        return True
    return False
