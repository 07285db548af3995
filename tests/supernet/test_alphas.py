from __future__ import annotations

import pytest
import torch

from nni_cream.supernet.alphas import Alphas


class TestAlphas:
    def test_starts_as_small_normal_numbers(self) -> None:
        torch.manual_seed(3)
        alphas = Alphas()
        alphas.share("first", 5, 8)
        alphas.share("second", 3)
        torch.manual_seed(3)
        assert torch.equal(alphas["first"], 1e-3 * torch.randn(5, 8))
        assert torch.equal(alphas["second"], 1e-3 * torch.randn(3))

    def test_one_table_for_each_name(self) -> None:
        alphas = Alphas()
        alphas.share("b", 2, 3)
        alphas.share("a", 4)
        before, state = alphas["b"].detach().clone(), torch.get_rng_state()
        weights = alphas.share("b", 2, 3)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(alphas["b"], before)
        assert list(alphas) == ["b", "a"]
        assert len(alphas) == 2
        assert [tuple(table.shape) for table in alphas.parameters()] == [(2, 3), (4,)]
        assert alphas["b"] is alphas.tables[0]
        assert torch.equal(weights(), before.softmax(-1))

    @pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 3, 1)])
    def test_another_shape(self, shape: tuple[int, ...]) -> None:
        alphas = Alphas()
        alphas.share("table", 2, 3)
        with pytest.raises(ValueError, match=r"The table 'table' of α has shape \[2, 3\], not \[" + str(shape[0])):
            alphas.share("table", *shape)

    def test_mixing_weights_follow_alpha(self) -> None:
        alphas = Alphas()
        weights = alphas.share("table", 2, 3)
        # In place, by a loaded state, and in another precision.
        with torch.no_grad():
            alphas["table"].copy_(torch.tensor([[0.0, 1.0, 2.0], [-1.0, 0.5, 0.5]]))
        torch.testing.assert_close(weights(), alphas["table"].exp() / alphas["table"].exp().sum(1, keepdim=True))
        alphas.load_state_dict({"tables.0": torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])})
        assert torch.equal(weights()[1], torch.full((3,), 1 / 3))
        alphas.double()
        assert weights().dtype == torch.float64
        assert alphas.mixing_weights("table").requires_grad
        torch.testing.assert_close(weights().sum(1), torch.ones(2, dtype=torch.float64))
