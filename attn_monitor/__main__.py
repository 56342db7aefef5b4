"""`python -m attn_monitor`: the `attn-monitor` command."""

from attn_monitor.offline.cli import main

if __name__ == "__main__":  # importing the module, as one does who imports every module, runs nothing
    main()
