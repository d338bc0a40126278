{{/* Names are fixed: a cluster has one driver csi.zpod.storage, whatever its release is called. */}}
{{- define "zpod.driver" -}}csi.zpod.storage{{- end }}

{{- define "zpod.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/part-of: zpod
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{/* What selects the pods of a component. */}}
{{- define "zpod.selector" -}}
app.kubernetes.io/name: zpod-{{ . }}
{{- end }}

{{/* An image and when to pull it: (dict "root" $ "image" .Values.image). */}}
{{- define "zpod.image" -}}
image: {{ printf "%s:%s" .image.repository (.image.tag | default .root.Chart.AppVersion) }}
imagePullPolicy: {{ .image.pullPolicy }}
{{- end }}

{{/* Whether groups of snapshots can be had. csi-snapshotter waits for ever for a kind that the cluster doesn't know. */}}
{{- define "zpod.groupSnapshots" -}}
{{- and .Values.snapshotter.enabled .Values.snapshotter.groupSnapshots (.Capabilities.APIVersions.Has "groupsnapshot.storage.k8s.io/v1") -}}
{{- end }}

{{/* The least that a container can run with. Those on the nodes are root, since kubelet's sockets and directories are
root's; without capabilities, that is an owner and no more. */}}
{{- define "zpod.unprivileged" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* A service account's token, for the containers that mount it and no others. */}}
{{- define "zpod.tokenVolume" -}}
- name: token
  projected:
    defaultMode: 0440
    sources:
      - serviceAccountToken:
          path: token
          expirationSeconds: 3607
      - configMap:
          name: kube-root-ca.crt
          items:
            - key: ca.crt
              path: ca.crt
      - downwardAPI:
          items:
            - path: namespace
              fieldRef:
                fieldPath: metadata.namespace
{{- end }}

{{- define "zpod.tokenMount" -}}
- name: token
  mountPath: /var/run/secrets/kubernetes.io/serviceaccount
  readOnly: true
{{- end }}

{{/* Probes of a container that answers at a port: (dict "port" 9808 "path" "/healthz"). */}}
{{- define "zpod.livenessProbe" -}}
livenessProbe:
  httpGet:
    path: {{ .path }}
    port: {{ .port }}
  initialDelaySeconds: 10
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 5
{{- end }}

{{/* A sidecar of the controller:
(dict "root" $ "name" "csi-provisioner" "values" .Values.provisioner "port" 9811 "args" (list ...)). */}}
{{- define "zpod.controllerSidecar" -}}
- name: {{ .name }}
  {{- include "zpod.image" (dict "root" .root "image" .values.image) | nindent 2 }}
  args:
    - --csi-address=/csi/csi.sock
    - --leader-election
    - --leader-election-namespace=$(NAMESPACE)
    - --http-endpoint=:{{ .port }}
    - --timeout={{ .values.timeout }}
    {{- range .args }}
    - {{ . }}
    {{- end }}
    - --v={{ .root.Values.sidecarLogLevel }}
    {{- with .values.extraArgs }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  env:
    - name: NAMESPACE
      valueFrom:
        fieldRef:
          fieldPath: metadata.namespace
    - name: POD_NAME
      valueFrom:
        fieldRef:
          fieldPath: metadata.name
  ports:
    - name: {{ .portName }}
      containerPort: {{ .port }}
  {{- include "zpod.livenessProbe" (dict "port" .port "path" "/healthz/leader-election") | nindent 2 }}
  resources:
    {{- toYaml .values.resources | nindent 4 }}
  securityContext:
    {{- include "zpod.unprivileged" . | nindent 4 }}
  volumeMounts:
    - name: socket
      mountPath: /csi
    {{- include "zpod.tokenMount" . | nindent 4 }}
{{- end }}
