"""The subcommands of `opsd`, one module each: `main(arguments)` reads its options and does its job."""
