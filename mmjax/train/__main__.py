"""python -m mmjax.train CONFIG [--field value ...], or finetune --model DIR --data FILE ... (train.finetune), or export RUN DST (train.export)."""

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
