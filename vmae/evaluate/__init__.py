"""Evaluation of trained models: tests, features, detection, and pictures of what a model does."""
