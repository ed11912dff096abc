"""The ledger: tables, sessions, repositories and the one module through which states change."""
