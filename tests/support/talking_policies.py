"""Policies and tasks for runs whose environment answers with text."""

from typing import Any

import torch
from every_rule import Sharp, Talk, TalkTasks
from tiny_runs import data

from gear_lightning.callbacks.generation import GenerationCallback
from gear_lightning.credit import Uniform
from gear_lightning.generation.budgets import Budgets
from gear_lightning.module import GearModule
from gear_lightning.teacher import TeacherOptions


def policy(credit=Uniform(), lr=3e-2) -> GearModule:
    return GearModule(
        Sharp(),
        credit,
        teacher=TeacherOptions(template=" <ref> {reference}"),
        optimizer=lambda p: torch.optim.SGD(p, lr=lr),
    )


def talking(kind: Any = GenerationCallback, **options) -> GenerationCallback:
    return kind(environment=Talk, budgets=Budgets(4, 80, 24, 250), **options)


def tasks(**options):
    return data(**{"train_tasks": TalkTasks(turns=4), "val_tasks": None, "group_size": 6, **options})
