{{- define "cdc-invalidator.selector" -}}
app.kubernetes.io/name: cdc-invalidator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "cdc-invalidator.labels" -}}
{{ include "cdc-invalidator.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}
