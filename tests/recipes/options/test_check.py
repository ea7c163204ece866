"""Errors in keys, classes and files: what was meant, what there is, and where it is written."""

from pathlib import Path

import pytest

from gear_lightning.errors import UserError
from gear_lightning.recipes.options.check import Check
from gear_lightning.recipes.options.study_check import check_study
from gear_lightning.recipes.packaged import configs

QUICK = ["--config", str(configs() / "quickstart.yaml")]


@pytest.fixture
def own_module(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_module.py").write_text("class Mine:\n    def __init__(self, **options): ...\n")


def error(*arguments: str, command: str = "fit") -> str:
    with pytest.raises(UserError) as raised:
        Check(command).arguments([*QUICK, *arguments])
    return str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--generation.budgets.turn 3", "has no option turn; did you mean --generation.budgets.turns?"),
        ("--generation.budget.turns 3", "did you mean --generation.budgets.turns?"),
        ("--model.creditt GEAR", "did you mean --model.credit?"),
        ("--modl.credit GEAR", "did you mean --model.credit?"),
        ("--seed_everythin 1", "did you mean --seed_everything?"),
        ("--conf x.yaml", "did you mean --config?"),
        ("--trainer.max-epochs 3", "did you mean --trainer.max_epochs?"),
        ("--trainer.max_step 3", "did you mean --trainer.max_steps?"),
        ("--max_steps 3", "did you mean --trainer.max_steps?"),
        ("--lr 1e-3", "did you mean --model.optimizer.lr?"),
        ("--model.group_size 4", "did you mean --data.group_size?"),
        ("--credit.kappa 3", "did you mean --model.credit.kappa?"),
        ("--model.credit.kapa 3", "did you mean --model.credit.kappa?"),
        ("--model.lora.rnk 3", "did you mean --model.lora.rank?"),
        ("--warm_start.demonstrations.hop 3", "did you mean --warm_start.demonstrations.hops?"),
        ("--trainer.callbacks+=EarlyStopping --trainer.callbacks.patienc=3", "EarlyStopping has no option patienc"),
        ("--model.optimizer SGD --model.optimizer.betas 3", "SGD has no option betas"),
        ("--model.optimizer.params 3", "AdamW has no option params"),
        ("--model.credit Uniform --model.credit.kappa 3", "Uniform has no option kappa"),
        ("--data.train_tasks.foo 1", "options of LookupChainTasks: hops, split"),
        ("--data.train_tasks.foo 1", "other classes of data.train_tasks: DatasetTasks, GSM8KTasks, JsonlTasks"),
        ("--data.train_tasks.init_args.foo 1", "options of LookupChainTasks: hops, split"),
        ("--trainer.max_epochs.x 3", "trainer.max_epochs is one value"),
        ("--foo.bar 3", "the sections are model, data, trainer"),
        ("--model.credit Gea", "No class Gea; did you mean GEAR?"),
        ("--model.credit.class_path Gea", "did you mean GEAR?"),
        ("--model.optimizer AdmW", "did you mean AdamW?"),
        ("--trainer.callbacks+=EarlyStoping", "did you mean EarlyStopping?"),
        ("--data.train_tasks JsonTasks", "did you mean JsonlTasks?"),
        ("--model.credit gear_lightning.credits.GEAR", "no module gear_lightning.credits); did you mean gear_lightn"),
        ('--model.credit={"class_path":"GEAR","kapa":3}', "did you mean init_args.kappa?"),
        ('--model={"credit":{"class_path":"GEAR","init_args":{"kapa":3}}}', "GEAR has no option kapa"),
        ("--trainer.callbacks lightning.pytorch.callbacks.EarlyStoping", "did you mean lightning.pytorch.callbacks.E"),
        ("--data.train_tasks nosuch.Tasks", "--data.train_tasks: No class nosuch.Tasks (there is no module nosuch); "),
        ("--data.train_tasks nosuch.Tasks", "by name are DatasetTasks, GSM8KTasks, JsonlTasks"),
        ("--data.train_tasks.class_path nosuch.Tasks", "--data.train_tasks.class_path: No class nosuch.Tasks"),
        ("--data.train_tasks gear_lightning.environments.nosuch.X", "no module gear_lightning.environments.nosuch)"),
        ("--data.train_tasks gear_lightning.environments.jsnl.JsonlTasks", "mean gear_lightning.environments.jsonl.J"),
        ("--trainer.callbacks+=lightning.nosuch.X", "there is no module lightning.nosuch"),
        ("--trainer.callbacks+=lightning.pytorch.callbacks.Nothing", "No class lightning.pytorch.callbacks.Nothing; k"),
        ("--trainer.strategy nosuch.Own", "there is no module nosuch"),
        ("--model.optimizer torch.nosuch.X", "there is no module torch.nosuch); known by name are Adadelta"),
        ('--trainer.callbacks=[{"class_path":"nosuch.X"}]', ": No class nosuch.X (there is no module nosuch)"),
        ("--model.credit own_modul.Mine", "there is no module own_modul); did you mean own_module.Mine?"),
        ("--model.credit own_module.Min", "No class own_module.Min; did you mean own_module.Mine?"),
        ("--model.credit own_module.Mine --data.advantage nosuch.X", "there is no module nosuch"),
        ("--data.group_size x", "--data.group_size=x: must be a whole number"),
        ("--data.group_size=3.0", "--data.group_size=3.0: must be a whole number"),
        ("--data.group_size [4]", "--data.group_size: must be a whole number"),
        ("--data.group_size null", "--data.group_size=null: must be a whole number"),
        ("--trainer.max_epochs x", "--trainer.max_epochs=x: must be a whole number or null"),
        ("--model.teacher.rate much", "--model.teacher.rate=much: must be a number"),
        ("--trainer.enable_checkpointing ja", "--trainer.enable_checkpointing=ja: must be true or false or null"),
        ("--seed_everything x", "--seed_everything=x: must be a whole number or true or false"),
        ("--model.credit.where answers", "=answers: must be one of all, answer, actions; did you mean answer?"),
        ('--model.credit={"class_path":"GEAR","init_args":{"kappa":"x"}}', "--model.credit: model.credit.kappa=x: mus"),
        ('--data={"seed":1,"seed":2}', "--data: the key seed is there twice; remove one"),
        ('--config={"data":{"seed":1,"seed":2}}', "--config: the key seed is there twice; remove one"),
        ("--trainer.max_epochs", "--trainer.max_epochs: its value is missing"),
        ("--config=", "the name of a file is missing"),
        ("quickstart", "did you mean --config quickstart?"),
        ("-x 3", "-x: there is no such option"),
        ("--config no.yaml", "--config no.yaml: no such file"),
        ("-c no.yaml", "-c no.yaml: no such file"),
        ("--config=no.yaml", "--config no.yaml: no such file"),
        ("--config", "the name of a file is missing"),
        ("--config .", "is a directory"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line(arguments, message, own_module):
    assert message in error(*arguments.split(" "))


@pytest.mark.parametrize(
    "arguments",
    [
        "--trainer.strategy ddp",
        "--model.credit.init_args.kappa 3",
        "--model.credit.where answer --model.credit.kappa 3",
        "--model.credit.class_path Uniform",
        '--model.teacher={"rate":0.1}',
        "--model.chat.template_arguments.enable_thinking true",
        "--trainer.strategy DDPStrategy --trainer.strategy.static_graph true",
        "--model.lr_scheduler StepLR --model.lr_scheduler.step_size 3",
        "--trainer.callbacks+ EarlyStopping --trainer.callbacks.monitor x",
        "--trainer.logger false",
        "--model.objective null",
        "--model.credit own_module.Mine --model.credit.anything 3",
        "--model.optimizer gear_lightning.module.adamw",
        "--print_config=skip_null --trainer.gradient_clip_val -1",
        "--model.credit.help GEAR",
        "--trainer.callbacks.help EarlyStopping",
        "--data.val_tasks.dict_kwargs.x 3",
        "--trainer.precision=bf16-mixed",
        "--model.teacher.rate 1e-3 --trainer.gradient_clip_val null --trainer.max_epochs 1_000",
        "--data.group_size ${trainer.max_epochs} --trainer.limit_train_batches 0.5 --seed_everything false",
        "--model.credit own_module.Mine.Inner",
        "--model.credit collections.abc.Mine",
    ],
)
def test_what_the_parser_accepts_is_accepted(arguments, own_module):
    Check("fit").arguments([*QUICK, *arguments.split(" ")])


def test_an_option_of_one_command_is_unknown_to_another():
    assert "there is no such option" in error("--rollouts", "runs/x")
    Check("noise-floor").arguments([*QUICK, "--rollouts", "runs/x"])
    assert "did you mean --gpus?" in str(_raised(lambda: Check("fit", ["gpus"]).arguments([*QUICK, "--gpu", "8"])))


def _raised(call) -> UserError:
    with pytest.raises(UserError) as raised:
        call()
    return raised.value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer:\n  max_step: 3\n", ":2: trainer.max_step: trainer has no option max_step; did you mean "),
        ("\nmax_epochs: 3\n", ":2: max_epochs: there is no such option; did you mean trainer.max_epochs?"),
        ("trainer:\nmax_epochs: 3\n", ":2: max_epochs"),
        ("trainer:\n  max_epochs: 3\n  data:\n    group_size: 4\n", ": trainer has no option data; data is"),
        ("model:\n  group_size: 4\n", "did you mean data.group_size?"),
        ("model:\n  credit:\n    class_path: GEAR\n    kappa: 3\n", ":4: model.credit.kappa: must be one level deeper"),
        ("model:\n  credit:\n    class_path: GEAR\n    init_args:\n      kapa: 3\n", ":5: model.credit.kapa: GEAR"),
        ("model:\n  credit:\n    clas_path: GEAR\n", ":3: model.credit.clas_path"),
        ("model:\n  credit: Gea\n", ":2: model.credit: No class Gea; did you mean GEAR?"),
        ("trainer:\n  callbacks:\n  - class_path: EarlyStopping\n    init_args: {patienc: 3}\n", ":4: trainer.callb"),
        ("trainer:\n  callbacks:\n  - EarlyStoping\n", ":3: trainer.callbacks: No class EarlyStoping; did you mean"),
        ("trainer.max_step: 3\n", ":1: trainer.max_step: trainer has no option max_step"),
        ("trainer: {max_epochs: 3\n", ": no valid YAML"),
        ("trainer:\n\tmax_epochs: 3\n", ":2: no valid YAML"),
        ("just text\n", "a config must have keys and values"),
        ("data:\n  group_size: four\n", ":2: data.group_size=four: must be a whole number"),
        ("data:\n  group_size: {a: 4}\n", ":2: data.group_size: must be a whole number"),
        ("data.group_size: 4.5\n", ":1: data.group_size=4.5: must be a whole number"),
        ("model:\n  credit:\n    where: answers\n", ":3: model.credit.where=answers: must be one of all, answer, act"),
        ("data:\n  train_tasks: nosuch.Tasks\n", ":2: data.train_tasks: No class nosuch.Tasks (there is no module"),
        ("data:\n  train_tasks:\n    class_path: nosuch.Tasks\n", ":3: data.train_tasks.class_path: No class nosuch."),
        ("trainer:\n  callbacks:\n  - nosuch.X\n", ":3: trainer.callbacks: No class nosuch.X (there is no module nosu"),
        ("data:\n  group_size: 4\n  seed: 1\n  group_size: 5\n", ":4: the key group_size is there twice, in lines 2 "),
        ("data: {seed: 1}\ntrainer: {}\n'data': {}\n", ":3: the key data is there twice, in lines 1 and 3; remove one"),
        ("data.seed: 1\ndata.seed: 2\n", ":2: the key data.seed is there twice, in lines 1 and 2"),
        ("trainer:\n  callbacks:\n  - {class_path: Health,\n     class_path: Health}\n", ":4: the key class_path is"),
        ("model:\n  chat:\n    template_arguments: {a: {b: 1, b: 1}}\n", ":3: the key b is there twice, in lines 3 "),
        ("base: &a {max_step: 3}\ntrainer: *a\n", ":1: base: there is no such option"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    found = error("--config", str(file))
    assert found.startswith(f"{file}:")
    assert message in found


def test_a_key_twice_in_a_file_that_an_option_names(tmp_path, monkeypatch):
    (tmp_path / "credit.yaml").write_text("class_path: GEAR\nclass_path: Uniform\n")
    monkeypatch.chdir(tmp_path)
    assert error("--model.credit", "credit.yaml") == (
        "credit.yaml:2: the key class_path is there twice, in lines 1 and 2; remove one"
    )


def test_files_that_the_parser_accepts_are_accepted(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "trainer:\n  callbacks+:\n  - class_path: EarlyStopping\n    init_args: {monitor: x}\n  logger: false\n"
        "model:\n  credit: {kappa: 3}\n  optimizer: {lr: 0.5}\n"
        "  teacher: {class_path: gear_lightning.teacher.TeacherOptions}\n"
        "data:\n  val_tasks: {class_path: '${...train_tasks.class_path}', init_args: {hops: 3}}\nwarm_start.steps: 3\n"
        "generation: {environment: my_module.Env}\n"
        "model.chat.template_arguments: {one: &one {a: 1}, two: {<<: *one, a: 2}, three: *one}\n"
    )
    Check("fit").arguments([*QUICK, "--config", str(file)])


STUDIES = sorted(p for p in (configs() / "study").glob("*.yaml") if "\narms:" in p.read_text())
RECIPES = sorted(p for p in configs().rglob("*.yaml") if p not in STUDIES and p.parent.name != "slurm")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_packaged_recipes_have_no_mistakes(recipe, repository, monkeypatch):
    monkeypatch.chdir(repository)
    Check("fit").arguments([*QUICK, "--config", str(recipe)])


@pytest.mark.parametrize("plan", STUDIES, ids=lambda p: p.stem)
def test_packaged_studies_have_no_mistakes(plan, repository, monkeypatch):
    monkeypatch.chdir(repository)
    check_study(["--config", str(plan)])


def study(tmp_path: Path, text: str) -> str:
    file = tmp_path / "study.yaml"
    file.write_text(f"recipe: [quickstart]\n{text}")
    return str(_raised(lambda: check_study(["--config", str(file)])))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: 3\nseeds: 4\n", ":3: the key seeds is there twice, in lines 2 and 3"),
        ("arms:\n  A: {}\n  B: {}\n  A: {}\n", ":5: the key A is there twice, in lines 3 and 5"),
        ("seds: 3\n", ":2: seds: a study has no such key; did you mean seeds?"),
        ("arms:\n  A: {model.credit: GEAR, model.credit.kapa: 3}\n", ":3: model.credit.kapa: GEAR has no option kapa"),
        ("grid:\n  model.optimizer.lrr: [1]\n", "did you mean model.optimizer.lr?"),
        ("grid:\n  data.group_size: [4, x]\n", ":3: data.group_size=x: must be a whole number"),
        ("options: {data.group_size: x}\n", ":2: data.group_size=x: must be a whole number"),
        ("per_seed: {data.seed: '{seed}x'}\n", ":2: data.seed=0x: must be a whole number"),
        ("per_seed: {data.sed: '{seed}'}\n", "did you mean data.seed?"),
    ],
)
def test_a_mistake_in_a_study(tmp_path, text, message):
    assert message in study(tmp_path, text)


def test_a_mistyped_command_recipe_and_option_of_other_commands(command):
    for arguments, message in (
        (["fti"], "no command 'fti'; did you mean fit?"),
        (["fit", "--config", "quikstart"], "did you mean quickstart?"),
        (["fit", "--config", "configs/quikstart.yaml"], "did you mean configs/quickstart.yaml?"),
        (["credit", ".", "--iter", "3"], "did you mean --iteration?"),
        (["compare", ".", "--over", "step"], "invalid choice: 'step'"),
        (["recredit", ".", "--agains", "GEAR"], "did you mean --against?"),
        (["recredit", ".", "--credit", "GEAR", "--credit.kapa", "3"], "did you mean --credit.kappa?"),
        (["recipes", "--pat"], "did you mean --path?"),
        (["study", "--sed", "3"], "did you mean --seeds?"),
        (["doctor", "--config", "quickstart", "--gpu", "8"], "did you mean --gpus?"),
    ):
        status, out, err = command(*arguments)
        assert (status, out) == (2, ""), arguments
        assert message in err
        assert err.startswith("gear-lightning: error: ")


def test_the_parser_itself_refuses_abbreviations(command):
    from gear_lightning.recipes.recipe import read_recipe

    with pytest.raises(SystemExit):
        read_recipe([*QUICK, "--trainer.max_epoch", "3"])


def test_a_class_of_a_module_that_nothing_imports_is_known_by_its_name(command, tmp_path):
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"prompt": "a"}\n')
    tasks = ["--data.train_tasks", "JsonlTasks", "--data.train_tasks.path", str(file)]
    status, out, err = command("fit", *QUICK, *tasks, "--print_config")
    assert status == 0, err
    assert "class_path: gear_lightning.environments.jsonl.JsonlTasks" in out
