"""Servers of others that benches and tests run against: S3, the Hugging Face Hub; a proxy, a certificate authority."""
