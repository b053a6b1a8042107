{{/* Labels by which objects are chosen.  Takes (dict "root" $ "component" "serving"). */}}
{{- define "perch.selector" -}}
app.kubernetes.io/name: perch
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Labels of a pod: what it is chosen by, and what it belongs to. */}}
{{- define "perch.podLabels" -}}
{{ include "perch.selector" . }}
app.kubernetes.io/part-of: perch
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- end }}

{{/* Labels of every object. */}}
{{- define "perch.labels" -}}
{{ include "perch.podLabels" . }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Name of an image.  Takes (dict "root" $ "image" "serving"). */}}
{{- define "perch.image" -}}
{{- $images := .root.Values.images -}}
{{- $image := index $images .image -}}
{{- $tag := required "images.tag names the images, e.g. v0.1.0-3e9d1c2; `make images` prints it" ($image.tag | default $images.tag) -}}
{{- if $images.registry }}{{ trimSuffix "/" $images.registry }}/{{ end }}{{ $image.repository }}:{{ $tag }}
{{- if $image.digest }}@{{ $image.digest }}{{ end }}
{{- end }}

{{/* What Pod Security's `restricted` asks of a pod; the user is that of the images. */}}
{{- define "perch.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* What it asks of a container, and a root file system that cannot be written. */}}
{{- define "perch.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{/*
What every pod's spec begins with.  Takes (dict "root" $ "account" NAME "token" bool "scheduling" VALUES).
Kubernetes would put the address of a Service `perch-mlflow` into PERCH_MLFLOW_PORT, which is a setting: no service links.
*/}}
{{- define "perch.podStart" -}}
serviceAccountName: {{ .account }}
automountServiceAccountToken: {{ .token }}
enableServiceLinks: false
securityContext:
  {{- include "perch.podSecurity" . | nindent 2 }}
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .scheduling.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .scheduling.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .scheduling.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{/* Credentials that boto3 reads come from a Secret, or from the pod's account where none is named. */}}
{{- define "perch.objectStoreCredentials" -}}
{{- with .Values.objectStore.existingSecret }}
- name: AWS_ACCESS_KEY_ID
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: AWS_ACCESS_KEY_ID
- name: AWS_SECRET_ACCESS_KEY
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: AWS_SECRET_ACCESS_KEY
{{- end }}
{{- end }}

{{/* How Perch's own processes reach the store. */}}
{{- define "perch.objectStoreEnvironment" -}}
{{- with .Values.objectStore }}
{{- if .endpointUrl }}
- name: PERCH_S3_ENDPOINT_URL
  value: {{ .endpointUrl | quote }}
{{- end }}
{{- if .region }}
- name: PERCH_S3_REGION
  value: {{ .region | quote }}
{{- end }}
{{- if .caConfigMap }}
- name: PERCH_S3_CA_BUNDLE
  value: /etc/perch/object-store-ca/ca.crt
{{- end }}
{{- end }}
{{- include "perch.objectStoreCredentials" . }}
{{- end }}

{{- define "perch.objectStoreMounts" -}}
{{- if .Values.objectStore.caConfigMap }}
- name: object-store-ca
  mountPath: /etc/perch/object-store-ca
  readOnly: true
{{- end }}
{{- end }}

{{- define "perch.objectStoreVolumes" -}}
{{- with .Values.objectStore.caConfigMap }}
- name: object-store-ca
  configMap:
    name: {{ . }}
    items: [{key: ca.crt, path: ca.crt}]
{{- end }}
{{- end }}

{{/* A NetworkPolicy's rule: where to or from (everywhere, if nothing is named) and which ports.  Takes (dict "direction" "to" "peer" VALUES). */}}
{{- define "perch.networkRule" -}}
- ports:
    {{- range .peer.ports }}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
  {{- with .peer.peers }}
  {{ $.direction }}:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{/* Mebibytes of a size, such as 512Mi or 4Gi. */}}
{{- define "perch.mebibytes" -}}
{{- $number := regexFind "^[0-9]+" . | int64 -}}
{{- if hasSuffix "Ti" . }}{{ mul $number 1048576 }}
{{- else if hasSuffix "Gi" . }}{{ mul $number 1024 }}
{{- else if hasSuffix "Ki" . }}{{ div (add $number 1023) 1024 }}
{{- else }}{{ $number }}
{{- end }}
{{- end }}

{{/*
A container's resources, and disk: as much as its volumes may hold, and its logs (a node keeps 50 MiB of them unless told otherwise).
Without it, a cluster that gives each container some by default (GKE Autopilot: 1 GiB) evicts a pod whose volumes are far from full.
Requests are limits, for such clusters make them so.  Takes (dict "resources" VALUES "volumes" (list SIZE …)); what the values say themselves holds.
*/}}
{{- define "perch.resources" -}}
{{- $mebibytes := 128 }}
{{- range .volumes }}{{ $mebibytes = add $mebibytes (include "perch.mebibytes" . | int64) }}{{ end }}
{{- $disk := dict "ephemeral-storage" (printf "%dMi" $mebibytes) }}
{{- range $side := list "requests" "limits" }}
{{ $side }}:
  {{- toYaml (merge (deepCopy (index $.resources $side)) $disk) | nindent 2 }}
{{- end }}
{{- end }}

{{/* MLflow's address: that of the chart's own, unless another one is named. */}}
{{- define "perch.mlflowUri" -}}
{{- if .Values.mlflow.externalUri }}{{ .Values.mlflow.externalUri }}
{{- else if .Values.mlflow.enabled }}http://{{ .Release.Name }}-mlflow.{{ .Release.Namespace }}:5000
{{- end }}
{{- end }}

{{/* Port of an MLflow elsewhere. */}}
{{- define "perch.mlflowPort" -}}
{{- $url := urlParse .Values.mlflow.externalUri -}}
{{- regexFind ":[0-9]+$" $url.host | trimPrefix ":" | default (ternary "443" "80" (eq $url.scheme "https")) }}
{{- end }}

{{/* What Perch's own processes are told of this installation, without secrets; a map of variables. */}}
{{- define "perch.settings" -}}
PERCH_TARGET: kubernetes
PERCH_KUBERNETES_NAMESPACE: {{ .Release.Namespace }}
PERCH_KUBERNETES_RELEASE: {{ .Release.Name }}
{{- with .Values.route.clientsUrl }}
PERCH_CLIENTS_URL: {{ . | quote }}
{{- end }}
{{- with .Values.prometheus.url }}
PERCH_PROMETHEUS_URL: {{ . | quote }}
{{- end }}
{{- with include "perch.mlflowUri" . }}
PERCH_MLFLOW_URI: {{ . | quote }}
{{- end }}
{{- with .Values.airflow.uri }}
PERCH_AIRFLOW_URI: {{ . | quote }}
{{- end }}
{{- with .Values.objectStore }}
{{- if .runsUrl }}
PERCH_RUNS_URL: {{ .runsUrl | quote }}
{{- end }}
{{- if .releasesUrl }}
PERCH_RELEASES_URL: {{ .releasesUrl | quote }}
{{- end }}
{{- if .predictionsUrl }}
PERCH_PREDICTIONS_URL: {{ .predictionsUrl | quote }}
{{- end }}
{{- end }}
{{- end }}
