// A Go client of kvmesh: finds the routers of a cluster through etcd's own
// resolver, streams one generation and prints what it got as one JSON object.
//
//	interop -etcd 127.0.0.1:2379 -cluster default -tokens 20,21,22 -max 16
//
// Or of one address, without etcd: -target 127.0.0.1:8080.
//
// The stub in kvmeshv1 is made from proto/ with protoc-gen-go v1.36.10,
// protoc-gen-go-grpc v1.6.0 and the protoc of grpcio-tools; see generate.sh.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/naming/resolver"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	pb "kvmesh.invalid/interop/kvmeshv1"
)

// answer is what a test reads.
type answer struct {
	Accepted     bool     `json:"accepted"`
	TokenIds     []uint32 `json:"token_ids"`
	Text         string   `json:"text"`
	FinishReason string   `json:"finish_reason"`
	OutputTokens uint32   `json:"output_tokens"`
	Code         string   `json:"code"`
	Message      string   `json:"message"`
}

func main() {
	etcd := flag.String("etcd", "", "etcd endpoint, host:port")
	cluster := flag.String("cluster", "default", "name of the cluster")
	target := flag.String("target", "", "address of a router instead of etcd")
	model := flag.String("model", "", "model; empty for the only one")
	tokens := flag.String("tokens", "20,21,22", "prompt token ids")
	max := flag.Uint("max", 16, "most output tokens")
	authority := flag.String("authority", "kvmesh", "authority of calls through etcd; empty for grpc-go's own")
	timeout := flag.Duration("timeout", 30*time.Second, "deadline of the call")
	flag.Parse()
	got, err := run(*etcd, *cluster, *target, *authority, *model, *tokens, uint32(*max), *timeout)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if err := json.NewEncoder(os.Stdout).Encode(got); err != nil {
		os.Exit(1)
	}
}

func run(etcd, cluster, target, authority, model, tokens string, max uint32, timeout time.Duration) (*answer, error) {
	ids, err := parseIds(tokens)
	if err != nil {
		return nil, err
	}
	options := []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
	if etcd != "" {
		client, err := clientv3.New(clientv3.Config{Endpoints: []string{etcd}, DialTimeout: 5 * time.Second})
		if err != nil {
			return nil, err
		}
		defer client.Close()
		builder, err := resolver.NewBuilder(client)
		if err != nil {
			return nil, err
		}
		// Without an authority of its own grpc-go sends the percent-encoded path
		// of the target, which HTTP/2 servers in Rust refuse as malformed.
		if authority != "" {
			options = append(options, grpc.WithAuthority(authority))
		}
		options = append(options, grpc.WithResolvers(builder),
			grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`))
		target = fmt.Sprintf("etcd:///kvmesh/v1/%s/routers", cluster)
	}
	connection, err := grpc.NewClient(target, options...)
	if err != nil {
		return nil, err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	stream, err := pb.NewInferenceClient(connection).Generate(ctx, &pb.GenerateRequest{
		Model:    model,
		Input:    &pb.GenerateRequest_TokenIds{TokenIds: &pb.TokenIds{Ids: ids}},
		Stopping: &pb.Stopping{MaxTokens: max, IgnoreEndOfText: true},
	}, grpc.WaitForReady(true))
	if err != nil {
		return nil, err
	}
	return read(stream)
}

func parseIds(text string) ([]uint32, error) {
	var ids []uint32
	for _, word := range strings.Split(text, ",") {
		id, err := strconv.ParseUint(word, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("token id %q: %w", word, err)
		}
		ids = append(ids, uint32(id))
	}
	return ids, nil
}

// read takes a stream to its end. A status is part of the answer; what breaks
// the promise of the protocol is an error.
func read(stream pb.Inference_GenerateClient) (*answer, error) {
	got := &answer{TokenIds: []uint32{}}
	for {
		message, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			got.Code = "OK"
			return got, nil
		}
		if err != nil {
			got.Code = status.Code(err).String()
			got.Message = status.Convert(err).Message()
			return got, nil
		}
		if got.FinishReason != "" {
			return nil, errors.New("an event came after finished")
		}
		switch event := message.Event.(type) {
		case *pb.GenerateResponse_Accepted:
			got.Accepted = true
		case *pb.GenerateResponse_Tokens:
			if int(event.Tokens.FirstIndex) != len(got.TokenIds) && len(event.Tokens.Ids) > 0 {
				return nil, fmt.Errorf("index %d, not %d", event.Tokens.FirstIndex, len(got.TokenIds))
			}
			got.TokenIds = append(got.TokenIds, event.Tokens.Ids...)
			got.Text += event.Tokens.Text
		case *pb.GenerateResponse_Finished:
			got.Text += event.Finished.Text
			got.FinishReason = event.Finished.Reason.String()
			got.OutputTokens = event.Finished.Usage.GetOutputTokens()
		}
	}
}
