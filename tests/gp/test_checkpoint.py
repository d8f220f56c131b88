"""Checkpoints: resumed is the same as not interrupted, bit for bit; whole files; other fits refused."""

import pytest
import torch
from tests.gp.problems import data, process

from ritz import Hutchinson, Lanczos
from ritz.errors import OperandError
from ritz.gp import ExactGP, fit
from ritz.gp.adam import Adam
from ritz.gp.checkpoint import Checkpoint, describe
from ritz.gp.lbfgs import LBFGS
from ritz.gp.training import Clock, HeldOut
from ritz.kernels import RBF, Matern, Scale

PRODUCTS = (Hutchinson(20), Lanczos(rtol=1e-3))


class Interrupted(Exception):
    pass


def interrupt_at(step):
    def callback(count, loss, info):
        if count == step:
            raise Interrupted

    return callback


def state(gp):
    return torch.cat([p.detach().reshape(-1) for p in gp.parameters()])


def numbers(report):
    return [row[:3] for row in report.history], report.loss, report.scores, report.stopped, report.noise_start


def make(dtype=torch.float64):
    return process(dtype=dtype, noise=0.3, logdet=PRODUCTS)


@pytest.mark.filterwarnings("ignore::ritz.errors.ConvergenceWarning")  # float32 on its way to a small noise
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("optimizer", [Adam(6, lr=0.2), LBFGS(6, ftol=0.0)])
def test_resumed_equals_uninterrupted(optimizer, dtype, tmp_path):
    X, y = data(50, dtype=dtype)
    options = {"subset": 25, "subset_steps": 6, "optimizer": optimizer, "start_noise": True}
    whole = make(dtype)
    expected = fit(whole, X, y, **options)
    total = len(expected.history)
    assert total > 10
    for at in (4, total - 2):  # one in each stage
        path = tmp_path / f"{at}.pt"
        with pytest.raises(Interrupted):
            fit(make(dtype), X, y, checkpoint=path, callback=interrupt_at(at), **options)
        gp = make(dtype)
        gp.noise = 0.9  # what a resumed process starts from is of no account
        report = fit(gp, X, y, checkpoint=path, **options)
        assert torch.equal(state(gp), state(whole)) and numbers(report) == numbers(expected)
        assert report.preconditioner == expected.preconditioner
        assert report.evaluations["all"] >= expected.evaluations["all"]


def test_resume_with_held_out_scores_and_seldom_writes(tmp_path):
    X, y = data(50)
    held_out = HeldOut(*data(20, seed=3), every=2, patience=2)
    options = {"subset": None, "optimizer": Adam(12, lr=0.3, final=1.0), "validation": held_out}
    whole = make()
    expected = fit(whole, X, y, **options)
    keeper = Checkpoint(tmp_path / "c.pt", every=3)
    with pytest.raises(Interrupted):
        fit(make(), X, y, checkpoint=keeper, callback=interrupt_at(6), **options)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    assert saved["state"]["count"] == 3
    gp = make()
    report = fit(gp, X, y, checkpoint=keeper, **options)
    assert torch.equal(state(gp), state(whole)) and numbers(report) == numbers(expected)


def test_after_the_end_nothing_is_computed_again_and_more_steps_may_follow(tmp_path):
    X, y = data(40)
    path = tmp_path / "c.pt"
    options = {"subset": 20, "subset_steps": 3, "checkpoint": path}
    long = make()
    expected = fit(long, X, y, optimizer=LBFGS(6, ftol=0.0), subset=20, subset_steps=3)
    first = fit(make(), X, y, optimizer=LBFGS(3, ftol=0.0), **options)
    assert first.stopped["all"] == "steps"
    again = make()
    again.log_marginal_likelihood = again._dense = lambda *_, **__: pytest.fail("computed again")
    second = fit(again, X, y, optimizer=LBFGS(3, ftol=0.0), **options)
    assert numbers(second) == numbers(first)
    gp = make()
    report = fit(gp, X, y, optimizer=LBFGS(6, ftol=0.0), **options)
    assert torch.equal(state(gp), state(long)) and numbers(report) == numbers(expected)


def test_more_steps_with_held_out_scores(tmp_path):
    X, y = data(50)
    options = {"subset": None, "validation": HeldOut(*data(20, seed=3), every=2, patience=2)}
    whole = make()
    expected = fit(whole, X, y, optimizer=LBFGS(6, ftol=0.0), **options)
    short = make()
    first = fit(short, X, y, optimizer=LBFGS(3, ftol=0.0), checkpoint=tmp_path / "c.pt", **options)
    assert [step for _, step, _ in first.scores] == [0, 2, 3]  # one more where the steps are over
    again = make()
    second = fit(again, X, y, optimizer=LBFGS(3, ftol=0.0), checkpoint=tmp_path / "c.pt", **options)
    assert numbers(second) == numbers(first) and torch.equal(state(again), state(short))
    gp = make()
    report = fit(gp, X, y, optimizer=LBFGS(6, ftol=0.0), checkpoint=tmp_path / "c.pt", **options)
    assert torch.equal(state(gp), state(whole)) and numbers(report) == numbers(expected)


def test_more_steps_of_adam_only_where_its_schedule_is_flat(tmp_path):
    X, y = data(40)
    for final in (0.1, 1.0):
        options = {"subset": None, "checkpoint": tmp_path / f"{final}.pt"}
        fit(make(), X, y, optimizer=Adam(2, final=final), **options)
        gp, longer = make(), Adam(4, final=final)
        if final != 1:
            with pytest.raises(OperandError, match="different in the steps of Adam"):
                fit(gp, X, y, optimizer=longer, **options)
            continue
        whole = make()
        expected = fit(whole, X, y, optimizer=longer, subset=None)
        report = fit(gp, X, y, optimizer=longer, **options)
        assert torch.equal(state(gp), state(whole)) and numbers(report) == numbers(expected)


def test_stages_that_are_left_out_are_part_of_the_description(tmp_path):
    X, y = data(40)
    fit(process(), X, y, subset_steps=3, checkpoint=tmp_path / "c.pt")
    with pytest.raises(OperandError, match="different in subset"):  # stage "all" alone, from where nobody knows
        fit(process(), X, y, subset_steps=3, checkpoint=tmp_path / "c.pt", optimizer=LBFGS(3))


def test_priors_are_told_apart_by_their_values(tmp_path):
    X, y = data(20)

    def normal(loc):
        return torch.distributions.Normal(torch.tensor(loc), torch.tensor(1.0))

    class Own:
        def __init__(self, strength):
            self.strength = strength

        def log_prob(self, value):
            return -self.strength * value

    def mixture(loc):
        parts = torch.distributions.LogNormal(torch.tensor([0.0, loc]), torch.tensor([1.0, 2.0]))
        return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(2)), parts)

    makers = (
        lambda v: torch.distributions.LogNormal(torch.tensor(v), torch.tensor(1.0)),
        lambda v: torch.distributions.TransformedDistribution(
            normal(0.0), [torch.distributions.AffineTransform(v, 2.0), torch.distributions.ExpTransform()]
        ),
        mixture,
        Own,
    )
    seen = set()
    for prior in makers:
        one, same, other = (describe(process(priors={"noise": prior(v)}), X, y)["priors"] for v in (0.5, 0.5, 0.75))
        assert one == same != other and "0x" not in one
        seen |= {one, other}
    assert len(seen) == 2 * len(makers)
    path = tmp_path / "c.pt"
    for v, message in ((0.5, None), (0.5, None), (0.75, "different in priors")):
        gp = process(priors={"noise": makers[0](v)})
        if message is None:
            fit(gp, X, y, subset_steps=1, checkpoint=path)
        else:
            with pytest.raises(OperandError, match=message):
                fit(gp, X, y, subset_steps=1, checkpoint=path)


def test_stopped_by_time_goes_on(tmp_path, monkeypatch):
    X, y = data(40)
    options = {"subset": None, "optimizer": LBFGS(5, ftol=0.0)}
    whole = make()
    expected = fit(whole, X, y, **options)
    calls = 0
    for allowed in (2, 3, 4, 12, 12, 12, 12):  # evaluations of a call; some end in the middle of a line search
        left = iter([False] * allowed)
        monkeypatch.setattr(Clock, "late", lambda self, left=left: next(left, True))
        gp, calls = make(), calls + 1
        report = fit(gp, X, y, checkpoint=tmp_path / "c.pt", **options)
        if report.stopped["all"] != "stopped":
            break
    assert 2 < calls < 7 and torch.equal(state(gp), state(whole)) and numbers(report) == numbers(expected)


def test_file_is_plain_and_written_in_one_move(tmp_path, monkeypatch):
    X, y = data(40)
    path = tmp_path / "c.pt"
    fit(make(), X, y, subset=20, subset_steps=2, steps=1, checkpoint=path)
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]
    before = path.read_bytes()
    assert torch.load(path, weights_only=True)["stage"] == "all"

    def broken(content, file):
        file.write(b"half of")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="no space"):
        Checkpoint(path).save({"about": {}})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_other_fits_are_refused(tmp_path):
    X, y = data(40)
    path = tmp_path / "c.pt"

    def run(gp, X=X, y=y, **changes):
        options = {"subset": 20, "subset_steps": 2, "optimizer": LBFGS(1), "checkpoint": path} | changes
        return fit(gp, X, y, **options)

    run(make())
    run(make())  # the same is welcome
    Z = X.clone()
    Z[3, 1] += 1e-12
    frozen = make()
    frozen.raw_noise.requires_grad_(False)
    smoother = ExactGP(Scale(Matern(2.5, 3)), logdet=PRODUCTS).double()
    for words, gp, changes in (
        ("X;", make(), {"X": Z}),
        ("y;", make(), {"y": -y}),
        ("X, y;", make(), {"X": X[:30], "y": y[:30]}),
        ("parameters, constants", frozen, {}),
        ("model;", smoother, {}),
        ("model", ExactGP(Scale(RBF(3)), logdet=PRODUCTS).double(), {}),
        ("logdet", process(noise=0.3, logdet=(Hutchinson(20, seed=1), Lanczos(rtol=1e-3))), {}),
        ("optimizer", make(), {"optimizer": Adam(1)}),
        ("seed", make(), {"seed": 1}),
        ("validation", make(), {"validation": data(10)}),
    ):
        with pytest.raises(OperandError, match=f"belongs to another fit, different in {words}"):
            run(gp, **changes)
    path.write_bytes(b"something else")
    with pytest.raises(OperandError, match="not a checkpoint"):
        run(make())
    torch.save({"version": 99, "about": {}}, path)
    with pytest.raises(OperandError, match="version 99"):
        run(make())
    with pytest.raises(OperandError, match="directory that does not exist"):
        run(make(), checkpoint=tmp_path / "missing" / "c.pt")
    with pytest.raises(OperandError, match="every=0"):
        Checkpoint(path, every=0)


def test_descriptions_do_not_depend_on_the_process():
    X, y = data(10)

    class Odd:
        pass

    one, two = (describe(make(), X, y, objective=Odd()) for _ in range(2))
    assert one == two and "0x" not in one["objective"]
