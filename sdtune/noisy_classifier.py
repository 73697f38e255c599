"""The path that model cards of classifiers name; the class is in `sdtune.models.noisy_classifier`."""

from sdtune.models.noisy_classifier import NoisyClassifier as NoisyClassifier
