"""RMSNorm with several rows in a program: a published rule, its speedups and where they hold."""
