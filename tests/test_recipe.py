"""What fine-tuning names is tried before anything is loaded."""

import pytest
from timm.optim import list_optimizers

from tokengame.cli.main import main
from tokengame.config import FinetuneConfig
from tokengame.errors import TokenGameError
from tokengame.learning.recipe import check_recipe


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"opt": "magic"}, "timm has no optimiser --opt magic; it has .*adamw.*muon"),
        ({"opt": ""}, "timm has no optimiser"),
        ({"opt": "adahessian"}, "--opt adahessian needs second derivatives"),
        ({"sched": "magic"}, "no schedule --sched magic; try cosine"),
        ({"sched": "plateau"}, "no schedule --sched plateau"),
        ({"aa": "magic"}, "timm makes no augmentation --aa magic; try rand-m9"),
        ({"aa": ""}, "timm makes no augmentation"),
        ({"aa": "rand-q9"}, "timm makes no augmentation --aa rand-q9"),
        ({"aa": "rand-m9-foo"}, "'foo' is not a word and a number"),  # timm ignores it
    ],
)
def test_what_timm_does_not_know_is_refused(changes, sentence):
    with pytest.raises(TokenGameError, match=sentence) as caught:
        check_recipe(FinetuneConfig(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{}, *({"opt": name} for name in ("adamw", "sgd", "muon", "lion", "AdamW")),
     *({"sched": name} for name in ("cosine", "tanh", "step", "multistep", "poly", "constant", "rsqrt", "none")),
     *({"aa": name} for name in ("rand-m9-mstd0.5-inc1", "augmix-m3", "original-mstd0.5", "3a", "rand-tweights"))],
    ids=str,
)  # fmt: skip
def test_what_timm_knows_passes(changes):
    check_recipe(FinetuneConfig(**changes))


def test_optimisers_of_libraries_that_are_missing_are_refused_in_a_sentence():
    refused = []
    for name in list_optimizers():
        try:
            check_recipe(FinetuneConfig(opt=name))
        except TokenGameError:
            refused.append(name)
    assert len(refused) < len(list_optimizers()) / 2


@pytest.mark.parametrize("flag", ["--opt", "--sched", "--aa"])
def test_the_command_refuses_them_before_it_loads_anything(flag, tmp_path, capsys):
    run = ["finetune", "--backbone", "fashion", "--images", str(tmp_path / "nowhere"), "--policy", "nowhere"]
    assert main([*run, "--output", str(tmp_path / "tuned"), flag, "magic"]) == 2
    assert f"{flag} magic" in capsys.readouterr().err
    assert not (tmp_path / "tuned").exists()
