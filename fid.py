"""The Fréchet distance between two sets of features, each given by mean and covariance
(arXiv 1706.08500)."""

import numpy as np
import scipy.linalg


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); mu (D,), sigma (D, D), float64; a float.

    The trace of the root comes from symmetric eigenvalues: with S1 = A A^T, the eigenvalues of S1 S2
    are those of A^T S2 A, real and not negative. scipy.linalg.sqrtm of the product is slower, and goes
    complex or astray when a covariance is singular (scipy issues 19415 and 20178)."""
    values, vectors = scipy.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(min=0))
    values = scipy.linalg.eigvalsh(root.T @ sigma2 @ root)
    trace_of_root = np.sqrt(values.clip(min=0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root)
