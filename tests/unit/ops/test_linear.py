"""ops/linear.py against torch.nn.functional.linear, and the paths of the weight gradient."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_megatron.ops.backend import choose_product_backend
from dsv3_megatron.ops.linear import linear, linear_forward, linear_input_grad, linear_weight_grad, multiply_rows


def _case(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4, 6), (5, 6), (3, 4, 5))
    x, weight, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x.to(dtype), weight.to(dtype), grad.to(dtype)


def test_gradients_in_float64():
    x, weight, _ = _case(torch.float64)
    assert torch.autograd.gradcheck(linear, (x.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("backend", ["native", "via_fp32"])
def test_bf16_rounds_once(backend):
    x, weight, grad = _case(torch.bfloat16)
    exact_y = x.double() @ weight.double().T
    exact_x = grad.double() @ weight.double()
    exact_w = grad.double().flatten(0, 1).T @ x.double().flatten(0, 1)
    got = (
        linear_forward(x, weight, backend=backend),
        linear_input_grad(grad, weight, backend=backend),
        linear_weight_grad(grad, x, backend=backend),
    )
    for value, exact in zip(got, (exact_y, exact_x, exact_w), strict=True):
        assert value is not None and value.dtype == torch.bfloat16
        # Half a step of bf16's 8 bits, for sums in fp32 or better.
        torch.testing.assert_close(value.double(), exact, rtol=2**-8, atol=1e-3)


def test_main_grad_accumulates_in_fp32_and_is_marked():
    x, weight, grad = _case(torch.bfloat16)
    weight.requires_grad_()
    weight.main_grad = torch.ones(weight.shape, dtype=torch.float32)
    weight.grad_added_to_main_grad = False
    linear(x, weight, backend="via_fp32", accumulate_into_main_grad=True).backward(grad)
    exact = 1 + grad.double().flatten(0, 1).T @ x.double().flatten(0, 1)
    torch.testing.assert_close(weight.main_grad.double(), exact, rtol=1e-6, atol=1e-5)
    assert weight.grad_added_to_main_grad is True


@pytest.mark.parametrize("to_main_grad", [False, True])
def test_deferred_weight_gradient(to_main_grad):
    x, weight, grad = _case(torch.float64)
    x.requires_grad_()
    weight.requires_grad_()
    if to_main_grad:
        weight.main_grad = torch.zeros_like(weight)
    queue = []
    linear(x, weight, accumulate_into_main_grad=to_main_grad, defer_weight_grad=queue.append).backward(grad)
    torch.testing.assert_close(x.grad, grad @ weight.detach())
    assert weight.grad is None and len(queue) == 1
    queue[0]()
    got = weight.main_grad if to_main_grad else weight.grad
    torch.testing.assert_close(got, grad.flatten(0, 1).T @ x.detach().flatten(0, 1))
    with pytest.raises(RuntimeError, match="computed twice"):
        queue[0]()


def test_backend_choice():
    cpu = torch.device("cpu")
    assert choose_product_backend("auto", cpu, torch.float32) == "native"
    assert choose_product_backend("via_fp32", cpu, torch.float32) == "native"
    assert choose_product_backend("via_fp32", cpu, torch.bfloat16) == "via_fp32"
    assert choose_product_backend("native", cpu, torch.bfloat16) == "native"
    assert choose_product_backend("auto", torch.device("cuda"), torch.bfloat16) == "native"
    with pytest.raises(ValueError, match="backend='cutlass' of matrix products must be one of auto, native, via_fp32"):
        choose_product_backend("cutlass", cpu, torch.bfloat16)


def test_auto_follows_the_matrix_units(monkeypatch, caplog):
    from dsv3_megatron.ops import backend

    for has_units, expected in ((False, "via_fp32"), (True, "native")):
        backend._choose_automatically.cache_clear()
        backend.log_choice.cache_clear()
        monkeypatch.setattr(backend, "has_bf16_matrix_units", lambda has_units=has_units: has_units)
        with caplog.at_level("INFO", "dsv3_megatron"):
            assert choose_product_backend("auto", torch.device("cpu"), torch.bfloat16) == expected
        assert f"backend {expected}" in caplog.text
    monkeypatch.undo()
    backend._choose_automatically.cache_clear()
    backend.log_choice.cache_clear()


@pytest.mark.parametrize("num_outputs", [64, 36, 35], ids=["in 8 parts", "in 4 parts", "not in parts"])
@pytest.mark.parametrize(("dtype", "tolerance"), [
    (torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_few_rows_without_gradients(num_outputs, dtype, tolerance):
    """Each number of rows has its own product; one row may be a view with any strides. Sums of 200 terms of size 1."""
    generator = torch.Generator().manual_seed(0)
    wide, weight = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
                    for shape in ((9, 300), (num_outputs, 200)))
    with torch.no_grad():
        for x in (*(wide[:count, 50:250] for count in (0, 1, 2, 5, 8, 9)), wide[3:4, :200].expand(4, -1)[2:3]):
            exact = x.double() @ weight.double().T
            for found in (multiply_rows(x, weight), linear_forward(x.unsqueeze(1), weight, backend="native")[:, 0]):
                assert found.dtype == dtype and found.is_contiguous()
                torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=14 * tolerance)


def test_narrow_products_without_gradients_have_few_shapes():
    """Rows of any number are multiplied in a few numbers of rows, and only where narrow products are native."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-3, 4, (5, 8), generator=generator)
    counts = [*range(1, 100), 2048]
    seen: set[int] = set()

    class Rows(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket is torch.ops.aten.mm:
                seen.add(args[0].shape[0] if args[1].shape[1] == 5 else args[1].shape[1])  # of few rows it is W x^T
            return function(*args, **(kwargs or {}))

    for dtype, backend, expected in ((torch.bfloat16, "native", 8 + 7 + 1), (torch.bfloat16, "via_fp32", len(counts)),
                                     (torch.float32, "auto", len(counts))):
        seen.clear()
        for count in counts:
            x = torch.randint(-3, 4, (count, 1, 8), generator=generator).to(dtype)
            with torch.no_grad(), Rows():
                y = linear(x, weight.to(dtype), backend=backend)
            assert y.shape == (count, 1, 5) and torch.equal(y[:, 0].float(), x[:, 0].float() @ weight.float().t())
        assert len(seen) <= expected, (dtype, backend, seen)
        assert dtype == torch.bfloat16 and backend == "native" or len(seen) > 90


def test_on_cuda_a_narrow_product_is_added_to_the_main_gradient_in_fp32():
    """As torch is asked for it; no tensor beside the sum is made. On fake tensors: no GPU is needed."""
    asked = []

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            asked.append((str(function), kwargs))
            return function(*args, **(kwargs or {}))

    def on_cuda(*shape, dtype):
        return FakeTensor(mode, torch.empty(shape, dtype=dtype, device="meta"), torch.device("cuda:0"))

    with FakeTensorMode() as mode:
        total = on_cuda(5, 6, dtype=torch.float32)
        grad, x = (on_cuda(12, width, dtype=torch.bfloat16) for width in (5, 6))
        with Asked():
            assert linear_weight_grad(grad, x, main_grad=total) is None
    products = [(name, kwargs) for name, kwargs in asked if "mm" in name or "add" in name]
    assert [name for name, _ in products] == ["aten.addmm.dtype_out"], asked
    assert products[0][1]["out"] is total
