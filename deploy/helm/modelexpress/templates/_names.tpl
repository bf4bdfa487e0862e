{{- define "mx.name" -}}
{{- .Values.name | default .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "mx.selector" -}}
app.kubernetes.io/name: {{ include "mx.name" . }}
{{- end -}}

{{- define "mx.redisSelector" -}}
app.kubernetes.io/name: {{ include "mx.name" . }}-redis
{{- end -}}

{{- define "mx.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "mx.stateClaim" -}}
{{ .Values.store.existingClaim | default (printf "%s-state" (include "mx.name" .)) }}
{{- end -}}

{{- define "mx.cacheClaim" -}}
{{ .Values.cache.existingClaim | default (printf "%s-cache" (include "mx.name" .)) }}
{{- end -}}

{{- define "mx.tlsSecret" -}}
{{- if .Values.tls.certManager.issuer -}}
{{ .Values.tls.secret | default (printf "%s-tls" (include "mx.name" .)) }}
{{- else -}}
{{ .Values.tls.secret }}
{{- end -}}
{{- end -}}

{{- define "mx.redisSecret" -}}
{{ .Values.redis.existingSecret | default (printf "%s-redis" (include "mx.name" .)) }}
{{- end -}}

{{/* What the schema cannot say: values that need each other. */}}
{{- define "mx.check" -}}
{{- if and (gt (int .Values.replicas) 1) (ne .Values.store.kind "redis") -}}
{{- fail "replicas above 1 need store.kind=redis: one process at a time has the SQLite file" -}}
{{- end -}}
{{- if and (eq .Values.store.kind "redis") (not .Values.redis.bundled) (not .Values.redis.existingSecret) -}}
{{- fail "redis.bundled=false needs redis.existingSecret, a Secret with the key url" -}}
{{- end -}}
{{- if and (gt (int .Values.replicas) 1) .Values.cache.claim (ne .Values.cache.accessMode "ReadWriteMany") -}}
{{- fail "several replicas share a cache claim by cache.accessMode=ReadWriteMany alone" -}}
{{- end -}}
{{- if and (eq .Values.auth.mode "file") (not .Values.auth.accessSecret) -}}
{{- fail "auth.mode=file needs auth.accessSecret, a Secret with the key access.toml" -}}
{{- end -}}
{{- if and (eq .Values.auth.mode "kubernetes") (not .Values.auth.accounts) (not .Values.auth.accessSecret) -}}
{{- fail "auth.mode=kubernetes needs auth.accounts or auth.accessSecret: who may call" -}}
{{- end -}}
{{- if and .Values.tls.clientCertificates (not (include "mx.tlsSecret" .)) -}}
{{- fail "tls.clientCertificates needs tls.secret or tls.certManager.issuer" -}}
{{- end -}}
{{- end -}}
