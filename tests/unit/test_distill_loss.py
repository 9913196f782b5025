"""The distillation loss: against dense autograd in float64, gradcheck, its bounds, its memory, and what must not be a NaN."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import slm.losses as losses_module
from slm.losses import IGNORE, DenseTarget, Distillation, SparseTarget, linear_cross_entropy, linear_distillation

N, E, V, K = 13, 5, 17, 4


def case(dtype=torch.float64, n=N, seed=0, ignored=(2, 7), width=E, vocab=V):
    """(hidden, weight, labels, the teacher's log-probabilities at T = 1)."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (n,), generator=g)
    labels[[i for i in ignored if i < n]] = IGNORE
    teacher = (2 * torch.randn(n, vocab, generator=g, dtype=torch.float64)).log_softmax(1)
    return hidden, weight, labels, teacher


def sparse(teacher_NV, T=1.0, k=K, form="bucket", weight=1.0):
    log_p = (teacher_NV / T).log_softmax(1)
    head, index = log_p.topk(k, dim=1)
    if form == "sampled":  # any target of mass 1 will do
        return SparseTarget(index, head.log_softmax(1), None, weight)
    tail = log_p.scatter(1, index, -torch.inf).logsumexp(1)
    return SparseTarget(index, head, tail, weight)


def dense(teacher_NV, weight=1.0):
    """A live teacher with these logits."""
    return DenseTarget(teacher_NV, torch.eye(teacher_NV.shape[1], dtype=teacher_NV.dtype), weight)


def reference(hidden, weight, labels, targets, d, z_loss=0.0):
    """The definition, over whole logits, by autograd."""
    z = hidden @ weight.T
    T, valid = d.temperature, labels != IGNORE
    ce = F.cross_entropy(z, labels.clamp(min=0), reduction="none")
    log_q = (z / T).log_softmax(1)
    total = torch.zeros(len(z), dtype=z.dtype)
    for t in targets:
        if isinstance(t, DenseTarget):
            log_p = (t.hidden_NE @ t.weight_VE.T / T).log_softmax(1)
            total = total + t.weight * (log_p.exp() * (log_p - log_q[:, : log_p.shape[1]])).sum(1)
            continue
        lq = log_q.gather(1, t.index_NK)
        lp = t.log_p_NK
        if d.form in ("sampled", "raw", "renormalised", "both_renormalised"):
            lt = lp.log_softmax(1) if "renormalised" in d.form else lp
            ls = lq.log_softmax(1) if d.form == "both_renormalised" else lq
            value = (lt.exp() * ((0 if d.form == "sampled" else lt) - ls)).sum(1)
        else:
            lq_tail = log_q.scatter(1, t.index_NK, -torch.inf).logsumexp(1)
            b_q, b_p = torch.cat([lq, lq_tail[:, None]], 1), torch.cat([lp, t.log_tail_N[:, None]], 1)
            m = torch.logaddexp(b_q, b_p) - torch.log(torch.tensor(2.0, dtype=z.dtype))
            value = {
                "forward": (b_p.exp() * (b_p - b_q)).sum(1),
                "reverse": (b_q.exp() * (b_q - b_p)).sum(1),
                "jsd": 0.5 * ((b_p.exp() * (b_p - m)).sum(1) + (b_q.exp() * (b_q - m)).sum(1)),
            }[d.divergence]
        total = total + t.weight * value
    known = valid if d.present_N is None else valid & d.present_N
    a = torch.where(known, torch.tensor(d.alpha, dtype=z.dtype), torch.ones((), dtype=z.dtype))
    loss = a * ce + torch.where(known, (1 - d.alpha) * T**2 * total, 0.0) + z_loss * z.logsumexp(1) ** 2
    return loss[valid].sum()


KINDS = [("bucket", "forward"), ("bucket", "reverse"), ("bucket", "jsd"), ("sampled", "forward"), ("raw", "forward"),
         ("renormalised", "forward"), ("both_renormalised", "forward")]  # fmt: skip


@pytest.mark.parametrize(("form", "divergence"), KINDS)
@pytest.mark.parametrize("T", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [4, 64])
def test_every_form_is_its_definition(form, divergence, T, alpha, chunk, monkeypatch):
    """Loss and gradients of hidden states and head against float64 autograd over whole logits; chunks that do not divide,
    ignored labels, z-loss, a returned loss that is scaled."""
    monkeypatch.setattr(losses_module, "chunk_tokens", lambda vocab, device: chunk)
    hidden, weight, labels, teacher = case()
    target = sparse(teacher, T, form=form)
    d = Distillation((target,), alpha, T, form, divergence)
    expected = reference(hidden, weight, labels, [target], d, z_loss=1e-2)
    wanted = torch.autograd.grad(3 * expected, (hidden, weight))
    loss, parts = linear_distillation(hidden, weight, labels, d, z_loss=1e-2)
    found = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    ce, _ = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(parts[0], ce.detach())
    assert not parts.requires_grad


@pytest.mark.parametrize(("form", "divergence"), KINDS)
def test_the_gradient_is_that_of_the_returned_value(form, divergence):
    """Central differences in float64 at T = 2 with labels: loss and gradient carry the same T^2. (Not torch's gradcheck:
    it goes backward twice, which the kernel refuses.)"""
    hidden, weight, labels, teacher = case(n=5, ignored=(1,))
    d = Distillation((sparse(teacher, 2.0, form=form),), 0.4, 2.0, form, divergence)
    grads = torch.autograd.grad(linear_distillation(hidden, weight, labels, d)[0], (hidden, weight))
    for x, grad in zip((hidden, weight), grads, strict=True):
        flat = x.detach().view(-1)
        for i in range(flat.numel()):
            ends = []
            for step in (1e-6, -2e-6):
                flat[i] += step
                ends.append(float(linear_distillation(hidden, weight, labels, d)[0].detach()))
            flat[i] += 1e-6
            assert abs((ends[0] - ends[1]) / 2e-6 - float(grad.view(-1)[i])) < 1e-7


@pytest.mark.parametrize("T", [0.5, 1.0, 2.0, 4.0])
def test_all_entries_are_dense_kl(T):
    """k = V in float32, sparse and from a live teacher: torch's kl_div to 1e-6, its gradients to 1e-7."""
    hidden, weight, labels, teacher = case(torch.float32, ignored=())
    z = (hidden @ weight.T) / T
    expected = T**2 * F.kl_div(z.log_softmax(1), (teacher.float() / T).softmax(1), reduction="sum")
    wanted = torch.autograd.grad(expected / N, (hidden, weight))
    target = sparse(teacher.float(), T, k=V)
    assert (target.log_tail_N == -torch.inf).all()
    for t in (target, dense(teacher.float())):
        loss, _ = linear_distillation(hidden, weight, labels, Distillation((t,), 0.0, T))
        assert (loss - expected).detach().abs() / N <= 1e-6 * T**2
        for a, b in zip(torch.autograd.grad(loss / N, (hidden, weight)), wanted, strict=True):
            assert (a - b).abs().max() <= 1e-7 * max(1.0, T**2)


def mixtures(T):
    """Teachers with entries that overlap, live ones, and live ones that lack tokens of the student's."""
    first, second, third = (case(seed=seed)[3] for seed in (0, 1, 2))
    small = second[:, : V - 3]
    return {
        "sparse": (sparse(first, T),),
        "small": (dense(small),),
        "two sparse": (sparse(first, T, weight=0.3), sparse(second, T, k=6, weight=0.7)),
        "sparse, live": (sparse(first, T, weight=0.4), dense(small, 0.6)),
        "live, sparse": (dense(small, 0.6), sparse(first, T, weight=0.4)),
        "two live": (dense(first, 0.5), dense(small, 0.5)),
        "three": (sparse(first, T, weight=0.2), sparse(second, T, weight=0.3), dense(third, 0.5)),
    }


def assert_same(found, wanted, inputs):
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("teachers", mixtures(1.0))
@pytest.mark.parametrize("T", [1.0, 3.0])
@pytest.mark.parametrize("partly", [False, True])
def test_teachers_of_all_sorts_are_their_mixture(teachers, T, partly, monkeypatch):
    """Several teachers are the weighted sum of single ones, by definition and by the kernel itself; tokens that only the
    student has have no mass; with labels, z-loss and tokens without a target."""
    monkeypatch.setattr(losses_module, "chunk_tokens", lambda vocab, device: 4)
    hidden, weight, labels, _ = case()
    targets = mixtures(T)[teachers]
    present = torch.arange(N) % 3 > 0 if partly else None
    d = Distillation(targets, 0.2, T, present_N=present)
    loss, parts = linear_distillation(hidden, weight, labels, d, z_loss=1e-2)
    assert_same(loss, reference(hidden, weight, labels, targets, d, z_loss=1e-2), (hidden, weight))
    singles = [Distillation((replace(t, weight=1.0),), 0.2, T, present_N=present) for t in targets]
    values = [linear_distillation(hidden, weight, labels, single)[1][1] for single in singles]
    torch.testing.assert_close(parts[1], sum(t.weight * value for t, value in zip(targets, values, strict=True)))


@pytest.mark.parametrize("T", [1.0, 2.0])
def test_tokens_that_no_cache_knows_are_learned_from_their_labels(T):
    """present_N: blank rows (all entries the same, values that are no numbers) weigh nothing, and CE counts whole there."""
    hidden, weight, labels, teacher = case()
    target = sparse(teacher, T)
    present = torch.arange(N) % 3 > 0
    d = Distillation((target,), 0.2, T, present_N=present)
    blank = SparseTarget(
        torch.where(present[:, None], target.index_NK, 0),
        torch.where(present[:, None], target.log_p_NK, torch.nan),
        torch.where(present, target.log_tail_N, torch.nan),
    )
    loss, _ = linear_distillation(hidden, weight, labels, Distillation((blank,), 0.2, T, present_N=present))
    assert_same(loss, reference(hidden, weight, labels, [target], d), (hidden, weight))


def test_sums_of_parts_with_uneven_targets_are_the_sum_of_the_whole():
    """A batch cut in parts of 3, 0 and the other targets: sums and gradients add up, so that one division is right."""
    hidden, weight, labels, teacher = case(ignored=(2, 4, 5, 6))
    target = sparse(teacher)
    whole, parts = linear_distillation(hidden, weight, labels, Distillation((target,), 0.2))
    cut = []
    for rows in (slice(0, 4), slice(4, 7), slice(7, N)):
        t = SparseTarget(target.index_NK[rows], target.log_p_NK[rows], target.log_tail_N[rows])
        cut.append(linear_distillation(hidden[rows], weight, labels[rows], Distillation((t,), 0.2)))
    torch.testing.assert_close(sum(p for _, p in cut), parts)
    assert_same(sum(loss for loss, _ in cut), whole, (hidden, weight))


@pytest.mark.parametrize("gap", [10.0, 30.0, 60.0, 85.0])
def test_a_student_that_rules_the_tail_out_is_still_pulled_back(gap):
    """The student's tail holds e^-gap, of which 1 - sum has no digit left in float32: value and gradient are float64's,
    and the tail's part of the gradient is the teacher's 0.1."""
    logits = torch.zeros(1, 50)
    logits[0, :2] = gap
    index, log_p, tail = torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.3]]).log(), torch.tensor([0.1]).log()
    single, double = logits.clone().requires_grad_(), logits.double().requires_grad_()
    d = Distillation((SparseTarget(index, log_p, tail),), 0.0)
    loss, _ = linear_distillation(single, torch.eye(50), torch.zeros(1, dtype=torch.long), d)
    exact = [SparseTarget(index, log_p.double(), tail.double())]
    wanted = reference(double, torch.eye(50, dtype=torch.float64), torch.zeros(1, dtype=torch.long), exact, d)
    (found_grad,), (wanted_grad,) = torch.autograd.grad(loss, single), torch.autograd.grad(wanted, double)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(found_grad.double(), wanted_grad, rtol=1e-4, atol=1e-9)
    assert abs(float(found_grad.sum())) < 1e-6


def test_the_bucket_bounds_the_whole_from_below():
    """0 <= bucket <= KL; the difference is rho KL(tail, tail); more entries tell more; gradients on logits add up to 0."""
    g = torch.Generator().manual_seed(3)
    teacher = (2 * torch.randn(50, V, generator=g, dtype=torch.float64)).log_softmax(1)
    logits = torch.randn(50, V, generator=g, dtype=torch.float64, requires_grad=True)
    eye, labels = torch.eye(V, dtype=torch.float64), torch.zeros(50, dtype=torch.long)
    log_q = logits.detach().log_softmax(1)
    whole = (teacher.exp() * (teacher - log_q)).sum(1)
    before = torch.zeros(50, dtype=torch.float64)
    for k in range(1, V):
        target = sparse(teacher, k=k)
        rows = []
        for i in range(50):
            one = SparseTarget(target.index_NK[i : i + 1], target.log_p_NK[i : i + 1], target.log_tail_N[i : i + 1])
            loss, _ = linear_distillation(logits[i : i + 1], eye, labels[:1], Distillation((one,), 0.0))
            (grad,) = torch.autograd.grad(loss, logits)
            assert abs(float(grad.sum())) < 1e-12
            rows.append(loss.detach())
        value = torch.stack(rows)
        p_tail, q_tail = (x.scatter(1, target.index_NK, -torch.inf) for x in (teacher, log_q))
        shape_p, shape_q = (x - x.logsumexp(1, keepdim=True) for x in (p_tail, q_tail))
        inside = torch.where(shape_p > -torch.inf, shape_p.exp() * (shape_p - shape_q), 0.0).sum(1)
        torch.testing.assert_close(whole - value, target.log_tail_N.exp() * inside, rtol=0, atol=1e-9)
        assert (value >= before - 1e-12).all()
        before = value
    assert (before <= whole + 1e-12).all()


class _Made(TorchDispatchMode):
    """The sizes of all tensors that operations make in memory of their own (not views, in place or into `out`)."""

    def __init__(self):
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flat = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        before = {x.untyped_storage().data_ptr() for x in flat if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in before:
                self.elements.append(x.numel())
        return out


@pytest.mark.parametrize(("T", "buffers"), [(1.0, 1), (2.0, 2)])
def test_memory_does_not_grow_with_tokens_times_vocabulary(T, buffers, monkeypatch):
    """At 8 chunks, nothing is made that is larger than one chunk of logits. A sparse target takes one such buffer in all,
    as cross-entropy does, and a second at T != 1; a live teacher two more in each chunk, its logits and p."""
    chunk, n, v = 64, 512, 3000
    monkeypatch.setattr(losses_module, "chunk_tokens", lambda vocab, device: chunk)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 8, generator=g, requires_grad=True)
    weight = torch.randn(v, 8, generator=g, requires_grad=True)
    index = torch.stack([torch.randperm(v, generator=g)[:6] for _ in range(n)])
    head = torch.randn(n, 6, generator=g).log_softmax(1)
    bucket = SparseTarget(index, head - 0.1, torch.full((n,), -2.0))
    live = DenseTarget(hidden.detach(), weight.detach())
    for target, expected in ((bucket, buffers), (live, buffers + 2 * n // chunk)):
        with _Made() as made:
            loss, _ = linear_distillation(
                hidden, weight, torch.zeros(n, dtype=torch.long), Distillation((target,), 0.1, T)
            )
            loss.backward()
        assert max(made.elements) == chunk * v
        assert made.elements.count(chunk * v) == expected


def test_chunks_add_up_in_float32_for_bfloat16():
    """The head's gradient over 64 chunks in bfloat16 is as near to float64's as over one."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4096, 16, generator=g).bfloat16(), torch.randn(64, 16, generator=g).bfloat16()
    teacher = torch.randn(4096, 64, generator=g).log_softmax(1)
    labels = torch.randint(0, 64, (4096,), generator=g)
    target = sparse(teacher)

    def gradient(dtype, chunk):
        original = losses_module.chunk_tokens
        losses_module.chunk_tokens = lambda vocab, device: chunk
        try:
            w = weight.to(dtype, copy=True).requires_grad_()
            exact = SparseTarget(
                target.index_NK, target.log_p_NK.to(torch.float64), target.log_tail_N.to(torch.float64)
            )
            t = exact if dtype == torch.float64 else target
            linear_distillation(hidden.to(dtype), w, labels, Distillation((t,), 0.1))[0].backward()
            return w.grad.double()
        finally:
            losses_module.chunk_tokens = original

    exact = gradient(torch.float64, 4096)
    errors = [float((gradient(torch.bfloat16, c) - exact).norm() / exact.norm()) for c in (64, 4096)]
    assert errors[0] < 1.2 * errors[1] < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("form", "divergence"), [k for k in KINDS if k[0] != "both_renormalised"])
@pytest.mark.parametrize("T", [1.0, 2.0])
def test_nothing_becomes_a_nan(dtype, form, divergence, T):
    """Teachers that are sure, entries without mass, students that are sure of something else by 1e4, tails of nothing."""
    log_p = torch.full((4, 3), -torch.inf)
    log_p[:, 0] = 0.0
    index = torch.tensor([[0, 1, 2], [3, 4, 5], [1, 0, 2], [2, 3, 1]])
    for scale, label in itertools.product((0.0, 1.0, 1e4, -1e4), (0, 5)):
        hidden = (torch.eye(4, 6) * scale).to(dtype).requires_grad_()
        weight = torch.eye(6).to(dtype).requires_grad_()
        tails = [SparseTarget(index, log_p, torch.full((4,), tail)) for tail in (-torch.inf, -40.0, 0.0)]
        live = [dense(torch.eye(4, 6) * 1e4)] if divergence == "forward" else []
        for target in tails + live:
            d = Distillation((target,), 0.1, T, form, divergence)
            loss, parts = linear_distillation(hidden, weight, torch.full((4,), label), d)
            grads = torch.autograd.grad(loss, (hidden, weight))
            for x in (loss, parts, *grads):
                assert torch.isfinite(x).all(), (scale, label, target)


def test_a_batch_without_targets_is_0():
    hidden, weight, _, teacher = case()
    for T in (1.0, 2.0):
        d = Distillation((sparse(teacher, T),), 0.3, T)
        loss, parts = linear_distillation(hidden, weight, torch.full((N,), IGNORE), d)
        grads = torch.autograd.grad(loss, (hidden, weight))
        assert loss.detach() == 0
        assert not parts.any()
        assert not any(g.any() for g in grads)


def test_a_tied_weight_gets_both_gradients():
    """The head is the embedding: its gradient as a look-up and as a head add up."""
    _, weight, labels, teacher = case()
    d = Distillation((sparse(teacher),), 0.1)
    tokens = torch.arange(N) % V
    loss, _ = linear_distillation(F.embedding(tokens, weight), weight, labels, d)
    (found,) = torch.autograd.grad(loss, weight)
    (wanted,) = torch.autograd.grad(reference(F.embedding(tokens, weight), weight, labels, d.targets, d), weight)
    torch.testing.assert_close(found, wanted)


def test_what_would_be_read_as_something_else_is_refused():
    """Divergences where they are wrong, unknown names, a bucket without its mass, targets of other tokens."""
    hidden, weight, labels, teacher = case()
    target = sparse(teacher)
    with pytest.raises(ValueError, match="not linear in the teacher"):
        linear_distillation(hidden, weight, labels, Distillation((target,), 0.1, 1.0, "raw", "jsd"))
    for wrong in (
        {"targets": (dense(teacher),), "divergence": "reverse"},
        {"form": "buckets"},
        {"divergence": "backward"},
        {"targets": (SparseTarget(target.index_NK, target.log_p_NK),)},
        {"targets": ()},
        {"temperature": 0.0},
    ):
        with pytest.raises(ValueError, match="bucket|need"):
            Distillation(**{"targets": (target,), "alpha": 0.1} | wrong)
    for other, match in ((sparse(teacher[1:]), "rows"), (dense(teacher[1:]), "rows"), (dense(teacher), "cut its head")):
        with pytest.raises(ValueError, match=match):
            linear_distillation(hidden, weight[: V - 1], labels.clamp(max=V - 2), Distillation((other,), 0.1))
