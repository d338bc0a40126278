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

{{/* An image and when to pull it: (dict "root" $ "image" .Values.provisioner.image). With "value", the path of the image's
value, it is one of ours, which has no default. */}}
{{- define "zpod.image" -}}
{{- if not .image.repository }}
{{- fail (printf "%s.repository is not set. The project publishes no images: build its two and push them to a registry of yours (docs/install.md), then --set image.repository=REGISTRY/zpod --set guest.image.repository=REGISTRY/zpod-guest" .value) }}
{{- end }}
{{- $digest := .image.digest | default "" }}
{{- $tag := .image.tag | default (ternary "" .root.Chart.AppVersion (ne $digest "")) }}
{{- $name := .image.repository }}
{{- if $tag }}{{ $name = printf "%s:%s" $name $tag }}{{ end }}
{{- $digest = $digest | default (get (.root.Files.Get "files/digests.yaml" | fromYaml) $name) }}
{{- if $digest }}{{ $name = printf "%s@%s" $name $digest }}{{ end -}}
image: {{ $name }}
imagePullPolicy: {{ .image.pullPolicy }}
{{- end }}

{{/* Secrets with registry credentials: names, or objects with a name as a pod has them. */}}
{{- define "zpod.imagePullSecrets" -}}
{{- with .Values.imagePullSecrets -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ kindIs "map" . | ternary (get (kindIs "map" . | ternary . dict) "name") . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Labels of a class: ours, and those of its value. */}}
{{- define "zpod.classLabels" -}}
{{- include "zpod.labels" .root }}
{{- with .class.labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Annotations of a class: that it is the default, and those of its value: (dict "class" . "default" "KEY"). */}}
{{- define "zpod.classAnnotations" -}}
{{- $annotations := dict }}
{{- if .class.default }}{{ $_ := set $annotations .default "true" }}{{ end }}
{{- with merge $annotations (.class.annotations | default dict) -}}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Kubernetes lets nobody change some fields of an object that is there. A value that asks for it is refused before
anything is changed, with what to do: an upgrade that the API server refuses halfway is worse.
(dict "apiVersion" "storage.k8s.io/v1" "kind" "StorageClass" "name" .name "fields" (dict "reclaimPolicy" "Delete")
"remedy" "..."). With "onceSet", a field that has no value yet, or gets none, is free. */}}
{{- define "zpod.unchanged" -}}
{{- $object := lookup .apiVersion .kind "" .name }}
{{- if $object }}
{{- $wanted := . }}
{{- range $field, $value := .fields }}
{{- $there := get $object $field | default (kindIs "map" $value | ternary dict "") }}
{{- $free := and $wanted.onceSet (or (empty $there) (empty $value)) }}
{{- if and (not $free) (ne (toJson $there) (toJson $value)) }}
{{- fail (printf "%s %s has %s: %s, and the values ask for %s. Kubernetes lets nobody change that. Nothing was changed. %s" $wanted.kind $wanted.name $field (toJson $there) (toJson $value) $wanted.remedy) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Whether groups of snapshots can be had. csi-snapshotter waits for ever for a kind that the cluster doesn't know. */}}
{{- define "zpod.groupSnapshots" -}}
{{- and .Values.snapshotter.enabled .Values.snapshotter.groupSnapshots (.Capabilities.APIVersions.Has "groupsnapshot.storage.k8s.io/v1") -}}
{{- end }}

{{/* Whether the node plugin has something to do with the guest's directory on the node: putting it there, or taking it away. */}}
{{- define "zpod.guestOnNode" -}}
{{- or .Values.guest.installer.enabled (.Values.guest.uninstall | default false) -}}
{{- end }}

{{/* A number in a values file is a float to Helm, and would be written as 1.7e+10. */}}
{{- define "zpod.size" -}}
{{- kindIs "string" . | ternary . (int64 (kindIs "string" . | ternary 0 .) | toString) -}}
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
