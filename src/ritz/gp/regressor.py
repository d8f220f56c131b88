"""A scikit-learn estimator for Gaussian-process regression; works without scikit-learn installed as well."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import torch

from ..errors import OperandError
from ..kernels.base import Kernel, Matern, Scale
from ..methods import Auto
from .exact import ExactGP
from .fit import fit


class GPRegressor:
    """Gaussian-process regression with scikit-learn's conventions: NumPy in, NumPy out.

    Args:
        kernel: a ritz kernel to start from, which is copied; None is ``Scale(Matern(2.5, ard_num_dims=d))``.
        noise: start value of the noise variance, in units of the (standardised) targets.
        solver, logdet: as in :class:`~ritz.gp.ExactGP`; None is ``Auto()``.
        standardize: shift and scale the columns of X and y to mean 0 and variance 1 inside.
        subset, subset_steps, steps, lr, max_seconds: as in :func:`ritz.gp.fit`; ``subset_steps=0, steps=0`` keeps the
            hyper-parameters.
        dtype: "float64" or "float32" (half the time and memory, at the price of accuracy for small noise).
        device: where to compute.
        random_state: of the random subset: an integer, a NumPy RandomState or Generator, or None for 0.
        callback: called with (step, loss, info) while fitting.

    Attributes:
        gp_: the fitted :class:`~ritz.gp.ExactGP`, in standardised units.
        posterior_: its posterior given the training data.
        fit_: the :class:`~ritz.gp.Fit` report.
        log_marginal_likelihood_: per point, of the standardised targets.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.

    Example:
        >>> import numpy as np
        >>> X = np.linspace(0, 6, 40)[:, None]
        >>> model = GPRegressor().fit(X, np.sin(X[:, 0]))
        >>> mean, std = model.predict(np.array([[1.0]]), return_std=True)
        >>> bool(abs(mean[0] - np.sin(1.0)) < 0.01)
        True
    """

    _estimator_type = "regressor"
    n_features_in_: int
    x_mean_: np.ndarray
    x_scale_: np.ndarray

    def __init__(
        self,
        kernel: Kernel | None = None,
        *,
        noise: float = 0.1,
        solver: Any = None,
        logdet: Any = None,
        standardize: bool = True,
        subset: int | None = 1000,
        subset_steps: int = 50,
        steps: int = 10,
        lr: float = 0.05,
        max_seconds: float | None = None,
        dtype: str = "float64",
        device: str = "cpu",
        random_state: Any = None,
        callback: Any = None,
    ) -> None:
        self.kernel = kernel
        self.noise = noise
        self.solver = solver
        self.logdet = logdet
        self.standardize = standardize
        self.subset = subset
        self.subset_steps = subset_steps
        self.steps = steps
        self.lr = lr
        self.max_seconds = max_seconds
        self.dtype = dtype
        self.device = device
        self.random_state = random_state
        self.callback = callback

    # -- scikit-learn's protocol, spelled out so that the class does not need scikit-learn ------------------------

    @classmethod
    def _names(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self, **params: Any) -> GPRegressor:
        """Change constructor arguments; returns the estimator."""
        names = self._names()
        for name, value in params.items():
            if name not in names:
                raise ValueError(f"Invalid parameter {name!r} for estimator {self}. Valid parameters are: {names}.")
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, RegressorTags, Tags, TargetTags

        return Tags(
            estimator_type="regressor",
            target_tags=TargetTags(required=True),
            regressor_tags=RegressorTags(),
            input_tags=InputTags(),
        )

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "posterior_")

    def __repr__(self) -> str:
        defaults = {k: p.default for k, p in inspect.signature(type(self).__init__).parameters.items()}
        given = {k: v for k, v in self.get_params().items() if repr(v) != repr(defaults[k])}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in given.items())})"

    # -- fitting and predicting -----------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any) -> GPRegressor:
        """Learn the hyper-parameters and condition on X (n, d), y (n,)."""
        X, y = self._validate(X, y, fitting=True)
        dtype = {"float64": torch.float64, "float32": torch.float32}.get(str(self.dtype))
        if dtype is None:
            raise OperandError(f"dtype={self.dtype!r}; expected 'float64' or 'float32'")
        d = X.shape[1]
        self.x_mean_, self.x_scale_ = _standard(X) if self.standardize else (np.zeros(d), np.ones(d))
        self.y_mean_, self.y_scale_ = (float(v) for v in (_standard(y) if self.standardize else (0.0, 1.0)))
        kernel = Scale(Matern(2.5, d)) if self.kernel is None else copy.deepcopy(self.kernel)
        seed = _seed(self.random_state)
        solver, logdet = (Auto() if value is None else value for value in (self.solver, self.logdet))
        gp = ExactGP(kernel, noise=self.noise, solver=solver, logdet=logdet)
        self.gp_ = gp.to(dtype).to(self.device)
        P = self._points(X)
        t = torch.as_tensor((y - self.y_mean_) / self.y_scale_).to(P)
        self.fit_ = fit(
            self.gp_,
            P,
            t,
            subset=self.subset,
            subset_steps=self.subset_steps,
            steps=self.steps,
            lr=self.lr,
            max_seconds=self.max_seconds,
            callback=self.callback,
            seed=seed,
        )
        self.log_marginal_likelihood_ = -self.fit_.loss
        self.posterior_ = self.gp_.condition(P, t)
        return self

    def predict(self, X: Any, return_std: bool = False, *, latent: bool = False) -> Any:
        """The posterior mean at X (n*, d), shape (n*,); with ``return_std`` also the standard deviation.

        The standard deviation is that of a new observation (the noise is learned, as scikit-learn's WhiteKernel, and
        is part of it); with ``latent=True`` that of the function without noise.
        """
        if not hasattr(self, "posterior_"):
            raise _not_fitted(self)
        P = self._points(self._validate(X))
        with torch.no_grad():
            mean = self.posterior_.mean(P).double().cpu().numpy() * self.y_scale_ + self.y_mean_
            if not return_std:
                return mean
            variance = self.posterior_.variance(P, noise=not latent).double().cpu().numpy()
        return mean, np.sqrt(variance) * self.y_scale_

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """R², the share of the variance of y that the mean explains."""
        y = np.asarray(y, dtype=np.float64).reshape(-1)
        w = np.ones_like(y) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
        residual = (w * (y - self.predict(X)) ** 2).sum()
        total = (w * (y - np.average(y, weights=w)) ** 2).sum()
        return float(1 - residual / total) if total > 0 else float(residual == 0)

    def _points(self, X: np.ndarray) -> torch.Tensor:
        parameter = self.gp_.raw_noise
        return torch.as_tensor((X - self.x_mean_) / self.x_scale_).to(parameter.dtype).to(parameter.device)

    def _validate(self, X: Any, y: Any = None, *, fitting: bool = False) -> Any:
        """Finite float64 arrays of matching shape, by scikit-learn's own rules and messages where it is there."""
        try:
            from sklearn.utils.validation import validate_data
        except ImportError:
            return self._validate_plainly(X, y, fitting)
        options: dict[str, Any] = {"dtype": np.float64}
        if not fitting:
            return validate_data(self, X, reset=False, **options)
        return validate_data(self, X, y, y_numeric=True, **options)

    def _validate_plainly(self, X: Any, y: Any, fitting: bool) -> Any:
        X = np.asarray(X, dtype=np.float64)
        if X.ndim != 2 or X.shape[0] == 0 or not np.isfinite(X).all():
            raise OperandError(f"X has shape {X.shape}; expected a finite array (n, d) with n >= 1")
        if not fitting:
            if X.shape[1] != self.n_features_in_:
                raise OperandError(f"X has {X.shape[1]} features, but the model was fitted with {self.n_features_in_}")
            return X
        y = np.asarray(y, dtype=np.float64)
        y = y.reshape(-1) if y.shape == (X.shape[0], 1) else y
        if y.shape != (X.shape[0],) or not np.isfinite(y).all():
            raise OperandError(f"y has shape {y.shape}; expected a finite array ({X.shape[0]},)")
        self.n_features_in_ = X.shape[1]
        return X, y


def _standard(x: np.ndarray) -> tuple[Any, Any]:
    """Mean and standard deviation by column; 1 where a column is constant up to rounding."""
    mean, scale = x.mean(0), x.std(0)
    return mean, np.where(scale > 1e-12 * (1 + np.abs(mean)), scale, 1.0)


def _seed(random_state: Any) -> int:
    if random_state is None:
        return 0
    if isinstance(random_state, (int, np.integer)):
        return int(random_state)
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**31))
    return int(random_state.randint(2**31 - 1))


def _not_fitted(estimator: GPRegressor) -> Exception:
    text = f"This {type(estimator).__name__} instance is not fitted yet; call fit(X, y) before predicting."
    try:
        from sklearn.exceptions import NotFittedError
    except ImportError:
        return OperandError(text)
    return NotFittedError(text)
