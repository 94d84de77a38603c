"""Objectives beside the plain denoising loss: terms of the one trainer's loss (see train.objectives.terms)."""
