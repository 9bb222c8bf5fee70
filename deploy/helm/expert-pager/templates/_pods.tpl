{{/* What pods share. */}}

{{- define "labels" -}}
app.kubernetes.io/part-of: expert-pager
{{- end }}

{{- define "image" -}}
{{ .repository }}:{{ .tag }}
{{- end }}

{{/* The settings: those that are given, else the kustomizations' for the device. */}}
{{- define "settings" -}}
{{ .Values.settings | default (.Files.Get (printf "files/service-%s.toml" .Values.device)) }}
{{- end }}

{{/* Has pods start anew when what they read at their start has changed. */}}
{{- define "checksum" -}}
expert-pager/settings: {{ list (include "settings" .) .Values.model.source .Values.model.dtype .Values.traces | toJson | sha256sum | trunc 16 }}
{{- end }}

{{- define "pod" -}}
serviceAccountName: expert-pager
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "container-security" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{- define "ray-env" -}}
- name: POD_IP
  valueFrom:
    fieldRef: {fieldPath: status.podIP}
- {name: RAY_AUTH_MODE, value: token}
- {name: RAY_AUTH_TOKEN_PATH, value: /run/secrets/expert-pager/ray-token}
{{- end }}

{{- define "traces-env" -}}
{{- if .Values.traces.enabled }}
envFrom:
  - configMapRef: {name: expert-pager-traces}
{{- end }}
{{- end }}

{{/* The init container that fetches, packs and verifies the model. */}}
{{- define "prepare-model" -}}
- name: prepare-model
  image: {{ include "image" .image }}
  args: [expert-pager-prepare, /models, /run/model/current]
  envFrom:
    - configMapRef: {name: expert-pager-model}
  env:
    - {name: HF_HOME, value: /models/.hub}
    - {name: HF_TOKEN_PATH, value: /run/secrets/expert-pager/hf-token}
  resources:
    {{- .Values.resources.prepare | default (dict "requests" (dict "cpu" "1" "memory" "4Gi") "limits" (dict "cpu" "4" "memory" "8Gi")) | toYaml | nindent 4 }}
  {{- include "container-security" . | nindent 2 }}
  volumeMounts:
    - {name: models, mountPath: /models}
    - {name: model-link, mountPath: /run/model}
    - {name: secrets, mountPath: /run/secrets/expert-pager, readOnly: true}
    - {name: tmp, mountPath: /tmp}
{{- end }}

{{- define "secrets-volume" -}}
- name: secrets
  secret: {secretName: {{ .Values.secret }}, defaultMode: 0440}
{{- end }}

{{- define "model-volumes" -}}
- name: models
  persistentVolumeClaim: {claimName: expert-pager-model}
- name: model-link
  emptyDir: {sizeLimit: 1Mi}
{{- end }}

{{/* The router, and with `ha` the keeper, which owns the workers. `.name` is the pod's. */}}
{{- define "router" -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ .name }}
  labels: {{- include "labels" . | nindent 4 }}
spec:
  {{- if .shares }}
  strategy:                    # how many there are is the autoscaler's to say
    type: RollingUpdate
    rollingUpdate: {maxUnavailable: 0, maxSurge: 1}
  {{- else }}
  replicas: 1
  strategy:
    type: Recreate             # it owns the workers: two would ask for the same names
  {{- end }}
  selector:
    matchLabels:
      app.kubernetes.io/name: {{ .name }}
  template:
    metadata:
      labels:
        app.kubernetes.io/name: {{ .name }}
        expert-pager/ray: member
        {{- include "labels" . | nindent 8 }}
      annotations: {{- include "checksum" . | nindent 8 }}
    spec:
      {{- include "pod" . | nindent 6 }}
      terminationGracePeriodSeconds: 120   # preStop, router.drain_s, and the end of the workers
      {{- if .shares }}
      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: ScheduleAnyway
          labelSelector:
            matchLabels:
              app.kubernetes.io/name: {{ .name }}
      {{- end }}
      initContainers:
        {{- include "prepare-model" (merge (dict "image" .Values.images.router) .) | nindent 8 }}
      containers:
        - name: router
          image: {{ include "image" .Values.images.router }}
          args: [expert-pager-router, --config, /etc/expert-pager/service.toml]
          env:
            {{- include "ray-env" . | nindent 12 }}
            - {name: RAY_HEAD_ADDRESS, value: "expert-pager-head-svc:6379"}
            {{- if .shares }}
            - {name: EXPERT_PAGER_WORKERS_COUNT, value: "0"}   # the keeper's
            {{- end }}
            {{- if .Values.ha.enabled }}
            - {name: REDIS_URL_FILE, value: /run/secrets/expert-pager/redis-url}
            {{- end }}
            {{- if .Values.tls.enabled }}
            - {name: EXPERT_PAGER_ROUTER_TLS_CERT, value: /run/tls/tls.crt}
            - {name: EXPERT_PAGER_ROUTER_TLS_KEY, value: /run/tls/tls.key}
            {{- end }}
          {{- include "traces-env" . | nindent 10 }}
          ports:
            - {name: grpc, containerPort: 50051}
            - {name: http, containerPort: 8080}
            - {name: health, containerPort: 50052}
            - {name: metrics, containerPort: 9464}
          startupProbe:            # does it listen? Before there is a worker, and then it is not ready
            tcpSocket: {port: health}
            periodSeconds: 10
            failureThreshold: 360
          readinessProbe:          # is there a worker that can answer?
            grpc: {port: 50052, service: expert_pager.v1.ExpertPager}
            periodSeconds: 5
            failureThreshold: 2
          livenessProbe:           # does the process answer at all? Workers and paging have no part in it
            grpc: {port: 50052}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 6
          lifecycle:
            preStop:
              exec: {command: [sleep, "5"]}   # until no client is sent here any more
          resources:
            {{- .Values.resources.router | default (dict "requests" (dict "cpu" "2" "memory" "2Gi") "limits" (dict "cpu" "4" "memory" "8Gi")) | toYaml | nindent 12 }}
          {{- include "container-security" . | nindent 10 }}
          volumeMounts:
            - {name: config, mountPath: /etc/expert-pager, readOnly: true}
            - {name: secrets, mountPath: /run/secrets/expert-pager, readOnly: true}
            - {name: models, mountPath: /models, readOnly: true}
            - {name: model-link, mountPath: /run/model, readOnly: true}
            - {name: tmp, mountPath: /tmp}
            - {name: shm, mountPath: /dev/shm}
            {{- if .Values.tls.enabled }}
            - {name: tls, mountPath: /run/tls, readOnly: true}
            {{- end }}
      volumes:
        - name: config
          configMap: {name: expert-pager-config}
        {{- include "secrets-volume" . | nindent 8 }}
        {{- include "model-volumes" . | nindent 8 }}
        - name: tmp                # Ray's sockets and logs
          emptyDir: {sizeLimit: 2Gi}
        - name: shm                # Ray's object store, which carries next to nothing
          emptyDir: {medium: Memory, sizeLimit: 256Mi}
        {{- if .Values.tls.enabled }}
        - name: tls
          secret: {secretName: {{ .Values.tls.secret }}, defaultMode: 0440}
        {{- end }}
{{- end }}

{{/* The template of the pod of Ray's head. KubeRay writes the command of its own. */}}
{{- define "head" -}}
metadata:
  labels:
    app.kubernetes.io/name: expert-pager-head
    expert-pager/ray: member
    {{- include "labels" . | nindent 4 }}
spec:
  {{- include "pod" . | nindent 2 }}
  terminationGracePeriodSeconds: 120   # not before those who need it
  containers:
    - name: ray-head
      image: {{ include "image" .Values.images.worker }}
      {{- if eq .Values.workers.kind "StatefulSet" }}
      args: [expert-pager-head]
      {{- end }}
      env:
        {{- include "ray-env" . | nindent 8 }}
      ports:
        - {name: gcs-server, containerPort: 6379}
        - {name: raylet, containerPort: 6380}
      startupProbe:                    # does it listen?
        tcpSocket: {port: gcs-server}
        periodSeconds: 5
        failureThreshold: 60
      readinessProbe:                  # does the cluster's register answer?
        grpc: {port: 6379}
        periodSeconds: 5
        failureThreshold: 3
      livenessProbe:                   # does this node answer?
        grpc: {port: 6380}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 12
      lifecycle:
        preStop:
          exec: {command: [sleep, "5"]}
      resources:
        {{- .Values.resources.head | default (dict "requests" (dict "cpu" "1" "memory" "4Gi") "limits" (dict "cpu" "2" "memory" "4Gi")) | toYaml | nindent 8 }}
      {{- include "container-security" . | nindent 6 }}
      volumeMounts:
        - {name: secrets, mountPath: /run/secrets/expert-pager, readOnly: true}
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
  volumes:
    {{- include "secrets-volume" . | nindent 4 }}
    - name: tmp
      emptyDir: {sizeLimit: 5Gi}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: 256Mi}
{{- end }}

{{- define "worker-resources" -}}
{{- $gpu := dict "cpu" "8" "memory" "64Gi" "nvidia.com/gpu" "1" }}
{{- $cpu := dict "cpu" "4" "memory" "24Gi" }}
{{- $each := ternary $gpu $cpu (eq .Values.device "gpu") }}
{{- .Values.resources.worker | default (dict "requests" $each "limits" $each) | toYaml }}
{{- end }}

{{/* The template of a worker's pod. */}}
{{- define "worker" -}}
{{- $plain := eq .Values.workers.kind "StatefulSet" }}
{{- $gpu := eq .Values.device "gpu" -}}
metadata:
  labels:
    app.kubernetes.io/name: expert-pager-worker
    expert-pager/ray: member
    {{- include "labels" . | nindent 4 }}
  annotations: {{- include "checksum" . | nindent 4 }}
spec:
  {{- include "pod" . | nindent 2 }}
  terminationGracePeriodSeconds: 120   # preStop waits 90 s at most
  {{- if $gpu }}
  tolerations:
    - {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}
  {{- end }}
  initContainers:
    {{- include "prepare-model" (merge (dict "image" .Values.images.worker) .) | nindent 4 }}
  containers:
    - name: worker
      image: {{ include "image" .Values.images.worker }}
      {{- if $plain }}
      args: [expert-pager-worker]
      {{- end }}
      env:
        {{- include "ray-env" . | nindent 8 }}
        {{- if $plain }}
        - {name: RAY_HEAD_ADDRESS, value: "expert-pager-head-svc:6379"}
        {{- if $gpu }}
        - {name: NUM_GPUS, value: "1"}
        {{- end }}
        {{- end }}
      {{- include "traces-env" . | nindent 6 }}
      ports:
        - {name: raylet, containerPort: 6380}
        - {name: metrics, containerPort: 9465}
      startupProbe:                    # does the node listen?
        tcpSocket: {port: raylet}
        periodSeconds: 5
        failureThreshold: 60
      readinessProbe:                  # has a worker loaded the model here?
        httpGet: {path: /metrics, port: metrics}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 3
      livenessProbe:                   # does the node answer? The worker on it has no part in it: the router watches that
        grpc: {port: 6380}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 12
      lifecycle:
        preStop:
          exec: {command: [expert-pager-worker-drain, "90"]}
      resources:                       # slots, KV, what forwards work with, /dev/shm and the interpreter
        {{- include "worker-resources" . | nindent 8 }}
      {{- include "container-security" . | nindent 6 }}
      volumeMounts:
        - {name: secrets, mountPath: /run/secrets/expert-pager, readOnly: true}
        - {name: models, mountPath: /models, readOnly: true}
        - {name: models, mountPath: /run/state, subPath: state}
        - {name: model-link, mountPath: /run/model, readOnly: true}
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
  volumes:
    {{- include "secrets-volume" . | nindent 4 }}
    {{- include "model-volumes" . | nindent 4 }}
    - name: tmp
      emptyDir: {sizeLimit: 5Gi}
    - name: shm                        # the host tier (workers.host_memory) and Ray's object store
      emptyDir: {medium: Memory, sizeLimit: {{ .Values.workers.sharedMemory | default (ternary "34Gi" "5Gi" $gpu) }}}
{{- end }}
