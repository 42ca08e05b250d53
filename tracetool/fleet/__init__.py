"""Many recordings at once: each is one task, results are one partitioned Parquet dataset, findings are triaged."""
