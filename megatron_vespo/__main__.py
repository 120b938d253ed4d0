from megatron_vespo.cli import main

raise SystemExit(main())
