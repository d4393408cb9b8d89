"""What several tests use: small models, process groups, clusters, servers, made-up results."""
