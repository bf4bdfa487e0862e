{{- define "mx.environment" -}}
{{- $tls := include "mx.tlsSecret" . -}}
- {name: MODEL_EXPRESS_SERVER_HOST, value: {{ .Values.server.host | quote }}}
{{- if eq .Values.store.kind "sqlite" }}
- {name: MX_STORE_PATH, value: /var/lib/mxserver/state.sqlite3}
{{- else }}
- {name: MX_METADATA_BACKEND, value: redis}
{{- if .Values.redis.bundled }}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef: {name: {{ include "mx.redisSecret" . | quote }}, key: password}
- {name: REDIS_URL, value: "redis://:$(REDIS_PASSWORD)@{{ include "mx.name" . }}-redis:6379/0"}
{{- else }}
- name: REDIS_URL
  valueFrom:
    secretKeyRef: {name: {{ include "mx.redisSecret" . | quote }}, key: url}
{{- end }}
{{- end }}
- {name: MODEL_EXPRESS_CACHE_DIRECTORY, value: /var/cache/mxserver}
- {name: HF_HOME, value: /tmp/huggingface}
- {name: HOME, value: /tmp} # the user has no entry in passwd, and the image is read-only
- {name: MX_CACHE_MAX_BYTES, value: {{ .Values.cache.maxBytes | quote }}}
- {name: MX_SERVER_NOT_READY_SECS, value: {{ .Values.server.notReadySeconds | quote }}}
- {name: MX_SERVER_DRAIN_SECS, value: {{ .Values.server.drainSeconds | quote }}}
- {name: MODEL_EXPRESS_LOG_FORMAT, value: {{ .Values.server.logFormat }}}
{{- if .Values.cache.huggingFaceSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ .Values.cache.huggingFaceSecret | quote }}, key: HF_TOKEN}
{{- end }}
{{- if $tls }}
- {name: MX_TLS_CERT_FILE, value: /etc/mxserver/tls/tls.crt}
- {name: MX_TLS_KEY_FILE, value: /etc/mxserver/tls/tls.key}
{{- if .Values.tls.clientCertificates }}
- {name: MX_TLS_CLIENT_CA_FILE, value: /etc/mxserver/tls/ca.crt}
{{- end }}
{{- end }}
{{- if ne .Values.auth.mode "off" }}
- {name: MX_AUTH, value: {{ .Values.auth.mode }}}
{{- if .Values.auth.accessSecret }}
- {name: MX_AUTH_FILE, value: /etc/mxserver/access/access.toml}
{{- end }}
{{- with .Values.auth.audience }}
- {name: MODEL_EXPRESS_SECURITY_TOKEN_AUDIENCES, value: {{ . | quote }}}
{{- end }}
{{- with .Values.auth.accounts }}
- {name: MODEL_EXPRESS_SECURITY_ALLOWED_SERVICE_ACCOUNTS, value: {{ join "," . | quote }}}
{{- end }}
{{- end }}
{{- range $name, $value := .Values.server.env }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end -}}

{{- define "mx.mounts" -}}
{{- if eq .Values.store.kind "sqlite" }}
- {name: state, mountPath: /var/lib/mxserver}
{{- end }}
- {name: cache, mountPath: /var/cache/mxserver}
- {name: tmp, mountPath: /tmp}
{{- if include "mx.tlsSecret" . }}
- {name: tls, mountPath: /etc/mxserver/tls, readOnly: true}
{{- end }}
{{- if .Values.auth.accessSecret }}
- {name: access, mountPath: /etc/mxserver/access, readOnly: true}
{{- end }}
{{- end -}}

{{- define "mx.volumes" -}}
{{- if eq .Values.store.kind "sqlite" }}
- name: state
  persistentVolumeClaim: {claimName: {{ include "mx.stateClaim" . | quote }}}
{{- end }}
- name: cache
{{- if or .Values.cache.claim .Values.cache.existingClaim }}
  persistentVolumeClaim: {claimName: {{ include "mx.cacheClaim" . | quote }}}
{{- else }}
  emptyDir: {sizeLimit: {{ .Values.cache.size }}}
{{- end }}
- name: tmp
  emptyDir: {sizeLimit: 1Gi}
{{- with include "mx.tlsSecret" . }}
- name: tls
  secret: {secretName: {{ . | quote }}, defaultMode: 0440}
{{- end }}
{{- with .Values.auth.accessSecret }}
- name: access
  secret: {secretName: {{ . | quote }}, defaultMode: 0440}
{{- end }}
{{- end -}}
