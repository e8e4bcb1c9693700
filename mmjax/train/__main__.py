"""python -m mmjax.train CONFIG [--field value ...]: trains what a config says.

python -m mmjax.train finetune --model DIR --data FILE ...     see train.finetune
python -m mmjax.train export RUN DST --to merged|adapter       see train.export
"""

from collections.abc import Sequence

from mmjax.core import config


def run(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["finetune"]:
        from mmjax.train import finetune

        return finetune.run(arguments[1:])
    if arguments[:1] == ["export"]:
        from mmjax.train import export

        return export.main(arguments[1:])
    cfg = config.from_command_line("mmjax.train", arguments, "Trains, evaluates and checkpoints a model.")
    from mmjax.train import loop

    return loop.run(cfg)


if __name__ == "__main__":
    config.main(run)
