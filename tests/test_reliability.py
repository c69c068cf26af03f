"""A short form of every attack, and the attacks' own judges: what is wrong must be found.

`python runs/reliability.py` has the long form, and `docs/reliability.md` what came of it.
"""

import mmap
import os
import subprocess
import sys
import time

import pytest
from attacks import policies, serve
from attacks.client import Attacker, compiled_faults
from attacks.outcome import Defect, Refused, accepted, generator, judged
from attacks.registry import ATTACKS, Attack

from tokengame import TokenGameError

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="attacks fork and read /proc"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
FILLS_THE_DISK = """
import ctypes, sys
ctypes.CDLL(None).faults_arm(sys.argv[1].encode(), ctypes.c_long(3), 2, 0)
file = open(sys.argv[1] + "/a", "wb", buffering=0)
file.write(b"one")
try:
    file.write(b"two")
except OSError as error:
    print(error.errno)
"""


@pytest.fixture(scope="module")
def attacker(tmp_path_factory):
    with Attacker(tmp_path_factory.mktemp("attacked")) as attacker:
        yield attacker


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_nothing_is_lost_or_silently_wrong(name, attacker):
    outcomes = list(attacker.run(name))
    if attacker.missing:
        pytest.skip(attacker.missing)
    assert len(outcomes) >= ATTACKS[name].short
    verdicts = {outcome.verdict for outcome in outcomes}
    assert "ok" in verdicts or name in ("commands", "disk"), "what is sound works"
    defects = [str(outcome) for outcome in outcomes if outcome.verdict == "defect"]
    assert not defects, "\n" + "\n".join(defects)


def raises(error):
    def case(*_):
        raise error

    return case


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (TokenGameError("no policy file at x"), "refused"),
        (TokenGameError(""), "defect"),
        (TokenGameError("two\nlines"), "defect"),
        (TokenGameError("[enforce fail] not enough memory: you tried to allocate 3 GB"), "defect"),
        (KeyError("dial"), "defect"),
        (MemoryError(), "defect"),
        (Defect("dial 0 is not native"), "defect"),
        (Refused("exit 2, --dial must lie between 0 and 1"), "refused"),
    ],
)
def test_only_a_sentence_refuses(error, verdict):
    assert judged(raises(error))[0] == verdict


def test_what_is_sound_must_not_be_refused():
    def case():
        with accepted("the policy"):
            raise TokenGameError("no policy file at x")

    assert judged(case) == ("defect", "the policy is refused: no policy file at x")


def attack_by(case):
    return Attack("", case, lambda _: 3, 3, chunk=3)


def outcomes_of(case, monkeypatch):
    monkeypatch.setattr(serve, "HANG", 1)
    return [outcome.verdict for outcome in serve.run("test", attack_by(case), None, 0, [0, 1, 2])]


def test_cases_after_one_that_dies_or_hangs_still_run(monkeypatch):
    def dies(_world, _seed, number):
        return os._exit(3) if number == 1 else "fine"

    def hangs(_world, _seed, number):
        while number == 1:
            time.sleep(60)
        return "fine"

    assert outcomes_of(dies, monkeypatch) == outcomes_of(hangs, monkeypatch) == ["ok", "defect", "ok"]


def test_memory_beyond_the_limit_is_a_defect(monkeypatch):
    def takes(_world, _seed, number):
        size = serve.LIMIT_MIB * 5 // 4 * 2**20 * (number == 1) + 2**20
        with mmap.mmap(-1, size) as memory:  # given back at once, whatever the allocator was told to keep
            for page in range(0, size, mmap.PAGESIZE):
                memory[page] = 1
        return "taken"

    assert outcomes_of(takes, monkeypatch) == ["ok", "defect", "ok"]


def test_a_full_disk_fails_the_chosen_write_and_no_other_folder(tmp_path):
    library = compiled_faults(tmp_path)
    if library is None:
        pytest.skip("no C compiler")
    (tmp_path / "full").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", FILLS_THE_DISK, str(tmp_path / "full")], env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["28"]
    assert (tmp_path / "full" / "a").read_bytes() == b"one"


def test_a_case_is_a_function_of_its_seed_and_number():
    data = (8).to_bytes(8, "little") + b"{}      " + bytes(200)
    first, second = (policies.damaged(data, generator("policies", 1, 7)) for _ in range(2))
    assert first == second
    assert len({policies.damaged(data, generator("policies", 1, n))[0] for n in range(50)}) > 30
