"""The command line ``lightning-lora``."""


def main() -> None: ...
