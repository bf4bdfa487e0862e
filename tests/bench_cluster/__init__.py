"""`make test-cluster`: mx bench peer and mx bench cluster between network namespaces with shaped links."""
